"""``python -m train``: train a network from the command line."""

import sys
from datetime import datetime
from pathlib import Path

from rich.console import Console

from train.config import build_parser, config_of, resolve
from train.errors import UserError
from train.run import train
from train.run_folder import RunFolder


def main(arguments: list[str]) -> None:
    """Begin a run, or go on with one.

    Args:
        arguments: of the command line.

    Raises:
        UserError: anything that the user can put right.
    """
    parser = build_parser()
    options = parser.parse_args(arguments)
    if options.resume is not None:
        if options.out is not None:
            raise UserError("--resume names the folder of the run; leave out --out")
        folder = RunFolder(Path(options.resume))
        folder.require_run()
        # The run's own configuration is the default, so that an option given beside it is seen to differ.
        config = config_of(parser.parse_args(["--config", str(folder.config), *arguments]))
        folder.require_same(config)
    else:
        config = resolve(config_of(options))
        name = "digits" if config.data.root is None else Path(config.data.root).name
        time = datetime.now().strftime("%Y%m%d-%H%M%S")
        folder = RunFolder(Path(options.out or f"runs/{name}-{config.norm}-{config.paths}-{time}"))
    train(config, folder, resume=options.resume is not None, console=Console())


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; --resume goes on with the run")
