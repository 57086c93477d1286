"""The configuration: defaults, files, overrides, and what it refuses."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml

from python_tests.support import ROOT
from train.config import Config, build_parser, config_of, differing_fields, resolve
from train.errors import UserError

CONFIGS = ROOT / "train" / "configs"


def parse(*arguments):
    return resolve(config_of(build_parser().parse_args(list(arguments))))


def test_the_default_run_is_the_whole_method_on_digits():
    config = parse()
    assert (config.norm, config.paths, config.split, config.data.root) == ("compound", "dual", True, None)
    assert (config.compound.num_components, config.depth, config.data.ratio) == (4, 20, 20)


def test_a_command_line_overrides_a_file(tmp_path):
    file = tmp_path / "some.yaml"
    file.write_text("norm: batch\nepochs: 7\ndata:\n  ratio: 50\n")
    config = parse("--config", str(file), "--epochs", "5", "--paths", "single", "--data.root", "X")
    assert (config.norm, config.paths, config.epochs) == ("batch", "single", 5)
    assert (config.data.ratio, config.data.root) == (50, str(Path("X").resolve()))


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configurations_are_read(path):
    given = yaml.safe_load(path.read_text())
    changed = {name for name, *_ in differing_fields(asdict(parse("--config", str(path))), asdict(parse()))}
    assert given and changed <= {"norm", "paths", "split", "depth", "epochs", "batch_size", "threads"} | {
        f"{group}.{name}" for group in ("compound", "data", "optimizer") for name in given.get(group, ())
    } | {"compound.affine_init"}


def test_the_papers_preset():
    config = parse("--config", str(CONFIGS / "cifar_lt.yaml"), "--data.root", "X")
    assert (config.depth, config.epochs, config.batch_size, config.data.ratio) == (32, 400, 128, 100)
    sgd = config.optimizer
    assert (sgd.lr, sgd.momentum, sgd.weight_decay) == (0.05, 0.9, 5e-4)
    assert 5 <= sgd.warmup_epochs <= 10


@pytest.mark.parametrize(
    ("options", "split", "affine_init"),
    [
        ([], True, "unit"),
        (["--compound.affine_init=preserve"], True, "preserve"),
        (["--split=false"], False, None),
        (["--paths=single"], False, None),
        (["--norm=batch"], False, None),
    ],
)
def test_what_depends_on_other_choices(options, split, affine_init):
    config = parse(*options)
    assert (config.split, config.compound.affine_init) == (split, affine_init)


def test_threads():
    assert parse().threads == 1
    assert parse("--data.root=X").threads == torch.get_num_threads()
    assert parse("--threads=3").threads == 3


def test_resolving_twice_changes_nothing():
    config = parse()
    assert resolve(config) == config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--split=true", "--norm=batch"],
            "needs norm compound and paths dual, got norm batch and paths dual",
        ),
        (["--split=true", "--paths=single"], "got norm compound and paths single"),
        (["--optimizer.warmup_epochs=60"], "warmup_epochs must be less than epochs, got 60 of 60"),
    ],
)
def test_choices_that_exclude_each_other(options, message):
    with pytest.raises(UserError, match=message):
        parse(*options)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--norm=layer", "layer"),
        ("--depth=21", "21"),
        ("--epochs=0", "epochs"),
        ("--data.ratio=-1", "ratio"),
        ("--data.validation=1", "validation"),
        ("--optimizer.lr=fast", "fast"),
        ("--nrom=batch", "nrom"),
    ],
)
def test_values_that_do_not_exist(option, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        parse(option)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_print_config_can_be_read_again(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        parse("--epochs=7", "--print_config")
    assert exit_.value.code == 0
    file = tmp_path / "printed.yaml"
    file.write_text(capsys.readouterr().out)
    assert parse("--config", str(file)) == parse("--epochs=7")


def test_a_group_of_options_from_a_file_of_its_own(tmp_path):
    file = tmp_path / "data.yaml"
    file.write_text("ratio: 7\n")
    config = parse("--data", str(file), "--data.seed=3")
    assert (config.data.ratio, config.data.seed, config.data.validation) == (7, 3, 0.1)


def test_values_are_plain():
    """What safe YAML and safe checkpoints can hold, not the parser's own types."""
    config = asdict(parse("--epochs=5", "--optimizer.lr=0.1", "--data.ratio=3"))
    values = [v for value in config.values() for v in (value.values() if isinstance(value, dict) else [value])]
    assert {type(value) for value in values} <= {str, int, float, bool, type(None)}


def test_differing_fields():
    config = Config()
    other = replace(config, epochs=9, data=replace(config.data, ratio=3.0))
    assert differing_fields(asdict(config), asdict(other)) == [("epochs", 60, 9), ("data.ratio", 20.0, 3.0)]
    assert differing_fields(asdict(config), asdict(config)) == []
    assert differing_fields({"old": 1}, {}) == [("old", 1, None)]
