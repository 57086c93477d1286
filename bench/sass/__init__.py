"""What the compiler made of the kernels: tools that read machine code (SASS), its loops, and a report."""
