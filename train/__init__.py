"""Long-tailed image classification with compound batch normalization: ``python -m train --help``."""
