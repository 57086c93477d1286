"""Whole runs: what they leave behind, resuming after a kill at any moment, errors of the user."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from PIL import Image

from cbn_ext import CompoundBatchNorm2d
from python_tests.support import ROOT
from train.__main__ import main
from train.config import OptimizerConfig
from train.engine import Trainer, learning_rate
from train.errors import UserError
from train.run_folder import write_atomically

EPOCHS = 3
# Dual paths with the split, warm-up and several steps an epoch, on 65 training images.
TINY = [f"--epochs={EPOCHS}", "--data.max_per_class=12", "--data.ratio=4", "--batch_size=32"]
TINY += ["--optimizer.warmup_epochs=1"]


@pytest.fixture(autouse=True)
def _threads():
    """A run sets the number of threads; the tests after it must not notice."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def records_of(folder):
    """The lines of metrics.jsonl without the times."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name != "seconds"} for record in records]


def assert_same_end(folder, reference):
    assert records_of(folder) == records_of(reference)
    for name in ("last.pt", "best.pt"):
        a, b = (torch.load(path / name, weights_only=True) for path in (folder, reference))
        assert a["model"].keys() == b["model"].keys()
        assert all(torch.equal(a["model"][key], b["model"][key]) for key in a["model"])
        assert len(a["history"]) == len(b["history"])
    moments = [
        [s["momentum_buffer"] for s in torch.load(path / "last.pt")["optimizer"]["state"].values()]
        for path in (folder, reference)
    ]
    assert all(torch.equal(x, y) for x, y in zip(*moments, strict=True))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "uninterrupted"
    main([*TINY, f"--out={folder}"])
    return folder


def test_what_a_run_leaves_behind(uninterrupted):
    assert {p.name for p in uninterrupted.iterdir()} == {
        "config.yaml", "metrics.jsonl", "last.pt", "best.pt", "report.html",
    }  # fmt: skip
    config = yaml.safe_load((uninterrupted / "config.yaml").read_text())
    assert config["split"] is True and config["compound"]["affine_init"] == "unit"
    *epochs, final = records_of(uninterrupted)
    assert [record["epoch"] for record in epochs] == list(range(1, EPOCHS + 1))
    for record in epochs:
        terms = record["first"] + record["second"] + record["consistency"]
        assert record["loss"] == pytest.approx(terms, abs=1e-5)
    assert final["final"] is True
    assert 0 <= final["last"]["overall"] <= 1 and len(final["last"]["per_class"]) == 10
    assert final["last"]["many"] is None


def test_best_is_chosen_on_validation(uninterrupted):
    *epochs, final = records_of(uninterrupted)
    best = max(epochs, key=lambda record: (record["validation"], record["epoch"]))["epoch"]
    assert final["best"]["epoch"] == best
    assert len(torch.load(uninterrupted / "best.pt")["history"]) == best


def test_the_test_set_is_looked_at_only_at_the_end(tmp_path, monkeypatch):
    seen = []
    evaluate = Trainer.evaluate

    def record(self, images):
        seen.append((len(images.labels), len(self.history)))
        return evaluate(self, images)

    monkeypatch.setattr(Trainer, "evaluate", record)
    main([*TINY, "--norm=batch", "--paths=single", f"--out={tmp_path / 'run'}"])
    assert [epochs for size, epochs in seen if size == 500] == [EPOCHS, EPOCHS]
    assert len([size for size, _ in seen if size < 20]) == EPOCHS


def test_the_report_needs_no_other_file(uninterrupted):
    page = (uninterrupted / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') == 4
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "num_components: 4" in page
    assert "absent" in page and "nan" not in page.split("base64")[0]


def command(*arguments):
    return [sys.executable, "-m", "train", *arguments]


def test_sigkill_and_resume(tmp_path, uninterrupted):
    folder = tmp_path / "killed"
    process = subprocess.Popen(command(*TINY, f"--out={folder}"), cwd=ROOT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (folder / "metrics.jsonl").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert len(torch.load(folder / "last.pt")["history"]) < EPOCHS
    subprocess.run(command(f"--resume={folder}"), cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    assert_same_end(folder, uninterrupted)


class Killed(BaseException):
    """Ends the run where it is raised; nothing in `train` catches it."""


# Each file is synchronised twice, itself before it gets its name and its folder after: here the run dies
# before, at the 1st, 3rd, … call, or after, at the 2nd, 4th, …; calls 1 and 2 are config.yaml's, then come
# the epochs' files.
@pytest.mark.parametrize("call", [2, 3, 5, 6, 8, 11, 18])
def test_killed_while_writing(tmp_path, uninterrupted, monkeypatch, call):
    folder = tmp_path / "killed"
    calls = []

    def fsync(descriptor):
        calls.append(descriptor)
        if len(calls) == call:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(Killed):
            main([*TINY, f"--out={folder}"])
    main([f"--resume={folder}"])
    assert_same_end(folder, uninterrupted)


def test_killed_before_the_configuration_is_written(tmp_path, monkeypatch):
    folder = tmp_path / "killed"

    def fsync(descriptor):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(Killed):
            main([*TINY, f"--out={folder}"])
    with pytest.raises(UserError, match="no run in"):
        main([f"--resume={folder}"])
    main([*TINY, "--epochs=1", "--optimizer.warmup_epochs=0", "--norm=batch", f"--out={folder}"])
    assert (folder / "report.html").exists()


def test_resuming_a_finished_run_repeats_its_end(tmp_path, uninterrupted):
    before = {p.name: p.read_bytes() for p in uninterrupted.iterdir()}
    main([f"--resume={uninterrupted}"])
    assert {p.name for p in uninterrupted.iterdir()} == set(before)
    for name in ("last.pt", "best.pt", "metrics.jsonl", "config.yaml"):
        assert (uninterrupted / name).read_bytes() == before[name]


def snapshot(folder):
    return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.iterdir()}


@pytest.mark.parametrize(
    ("options", "fields"),
    [
        (["--epochs=9"], ["epochs is 9, was 3"]),
        (["--norm=batch", "--data.ratio=5"], ["norm is batch, was compound", "data.ratio is 5.0, was 4.0"]),
        (["--compound.num_components=2"], ["compound.num_components is 2, was 4"]),
    ],
)
def test_resuming_with_another_configuration(uninterrupted, options, fields):
    before = snapshot(uninterrupted)
    with pytest.raises(UserError, match="belongs to another configuration") as error:
        main([f"--resume={uninterrupted}", *options])
    assert all(field in str(error.value) for field in fields)
    assert snapshot(uninterrupted) == before


def test_checkpoint_of_another_configuration(tmp_path, uninterrupted):
    """A checkpoint that was copied in, beside a configuration that agrees with the command line."""
    config = yaml.safe_load((uninterrupted / "config.yaml").read_text()) | {"seed": 5}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "last.pt").write_bytes((uninterrupted / "last.pt").read_bytes())
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match=r"last\.pt belongs to another configuration: seed is 5, was 0"):
        main([f"--resume={tmp_path}"])
    assert snapshot(tmp_path) == before


def test_checkpoint_of_other_images(tmp_path, uninterrupted):
    state = torch.load(uninterrupted / "last.pt")
    state["counts"][3] += 1
    (tmp_path / "config.yaml").write_bytes((uninterrupted / "config.yaml").read_bytes())
    torch.save(state, tmp_path / "last.pt")
    with pytest.raises(UserError, match="trained on other images"):
        main([f"--resume={tmp_path}"])


def test_damaged_checkpoint(tmp_path, uninterrupted):
    (tmp_path / "config.yaml").write_bytes((uninterrupted / "config.yaml").read_bytes())
    (tmp_path / "last.pt").write_bytes((uninterrupted / "last.pt").read_bytes()[:10_000])
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match=r"cannot read the checkpoint .*last.pt"):
        main([f"--resume={tmp_path}"])
    assert snapshot(tmp_path) == before


def test_a_folder_in_use_is_not_overwritten(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="is not empty; --resume"):
        main([*TINY, f"--out={tmp_path}"])
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_default_folder_is_named_after_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main([*TINY, "--epochs=1", "--optimizer.warmup_epochs=0", "--norm=batch", "--paths=single"])
    (run,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"digits-batch-single-\d{8}-\d{6}", run.name)


def test_full_disk(tmp_path, uninterrupted, monkeypatch):
    """The second epoch's checkpoint goes to a device that is always full."""
    folder = tmp_path / "run"
    save = Trainer.save

    def save_to_full_disk(self):
        if len(self.history) == 2:
            for name in ("best.pt", "last.pt"):
                (folder / f"{name}.partial").symlink_to("/dev/full")
        save(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save", save_to_full_disk)
        message = r"cannot write .*(best|last).pt: No space left on device \(the previous one is kept\)"
        with pytest.raises(UserError, match=message):
            main([*TINY, f"--out={folder}"])
    assert len(torch.load(folder / "last.pt")["history"]) == 1
    for partial in folder.glob("*.partial"):
        partial.unlink()
    main([f"--resume={folder}"])
    assert_same_end(folder, uninterrupted)


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, b"old")
    (tmp_path / "file.partial").symlink_to("/dev/full")
    with pytest.raises(UserError, match=os.strerror(errno.ENOSPC)):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_image_folder_with_a_bracketed_name_resumed_elsewhere(tmp_path, monkeypatch, capsys):
    for split, count in (("train", 4), ("test", 1)):
        for name in ("[a]", "[b]"):
            (tmp_path / "[bold]" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(0, 256, (8, 8, 3), dtype=torch.uint8).numpy()
                Image.fromarray(pixels).save(tmp_path / "[bold]" / split / name / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    main(["--data.root=[bold]", "--data.ratio=2", "--epochs=1", "--compound.num_components=2", "--out=run"])
    monkeypatch.chdir(tmp_path / "run")
    main(["--resume=."])
    assert capsys.readouterr().out.count("[bold]: 6 training images of 2 classes, 4 to 2 a class") == 2


def test_loss_that_is_not_finite(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(UserError, match="the loss is nan in epoch 1; try a lower"):
        main([*TINY, "--norm=batch", "--paths=single", "--optimizer.lr=1e30", f"--out={folder}"])
    assert [p.name for p in folder.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data.root=/nowhere"], "there is no folder /nowhere/train"),
        (["--data.ratio=500"], "data.ratio 500 leaves"),
        (
            ["--compound.num_components=17"],
            r"compound.num_components: expected 1 <= num_components <= 16, got 17",
        ),
        (
            ["--compound.num_components=11"],
            r"compound.num_components: expected 1 <= num_groups <= num_classes",
        ),
        (["--resume=/nowhere"], "there is no run in /nowhere"),
        (["--resume=/nowhere", "--out=x"], "leave out --out"),
    ],
)
def test_user_errors_write_nothing(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        main(options)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none(tmp_path):
    with pytest.raises(UserError, match="device is cuda, but torch finds no CUDA device"):
        main([*TINY, "--device=cuda", f"--out={tmp_path / 'run'}"])


def test_user_errors_leave_no_traceback(tmp_path):
    result = subprocess.run(command("--data.root=nowhere"), cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith(f"error: data.root: there is no folder {ROOT}/nowhere/train")
    assert "Traceback" not in result.stderr


def test_learning_rate():
    sgd = OptimizerConfig(lr=0.4)
    rates = [learning_rate(sgd, step, 30, 10) for step in range(30)]
    assert rates[:10] == pytest.approx([0.04 * (i + 1) for i in range(10)])
    # The schedules of torch.optim, stepped.
    optimizer = torch.optim.SGD([torch.zeros(1)], 0.4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    for rate in rates[10:]:
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()


def test_single_path_is_the_first_term(tmp_path):
    main([*TINY, "--paths=single", f"--out={tmp_path / 'run'}"])
    for record in records_of(tmp_path / "run")[:-1]:
        assert record["loss"] == record["first"] and "consistency" not in record


def test_options_of_the_layers_reach_them(tmp_path, monkeypatch):
    models = []
    fit = Trainer.fit
    monkeypatch.setattr(Trainer, "fit", lambda self, console: (models.append(self.model), fit(self, console)))
    options = ["--compound.responsibility=joint", "--compound.num_components=2", "--split=false"]
    options += ["--compound.detach_responsibility=true", "--compound.affine_init=preserve", "--epochs=1"]
    main([*TINY, *options, "--optimizer.warmup_epochs=0", f"--out={tmp_path / 'run'}"])
    layers = [m for m in models[0].modules() if isinstance(m, CompoundBatchNorm2d)]
    assert len(layers) == 19
    for layer in layers:
        assert (layer.responsibility, layer.num_components, layer.affine_init) == ("joint", 2, "preserve")
        assert layer.detach_responsibility
