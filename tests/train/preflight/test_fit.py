"""What fits, what is proposed where it does not, and what is refused before it starts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from jobs import CUT, LENGTH, ONE_RANK, job_of

from shoal.errors import UserError
from shoal.models.load import Checkpoint, LoadSettings
from shoal.recipe.distill import Distill, Lora, Recorded
from shoal.recipe.losses import TAID
from shoal.train.preflight import fit
from shoal.train.preflight.fit import Free, check_control, check_fit, disk_bytes, overrides, proposals
from shoal.train.preflight.memory import Job, Setting, job
from shoal.train.preflight.throughput import flops_per_token
from shoal.train.student.control import control_spec
from shoal.train.student.spec import train_spec


def test_what_fits_is_chosen_by_cost_and_keeps_the_batch(tiny_job: Job) -> None:
    plenty = Free(10**13, 10**13).cheapest(tiny_job)
    assert plenty is not None
    assert (plenty.stage, plenty.checkpointing, plenty.teacher) == (0, False, "live")
    batch = tiny_job.setting.rows * tiny_job.setting.accumulation
    peaks = []
    for setting in proposals(tiny_job):
        assert setting.rows * setting.accumulation == batch
        peaks.append(replace(tiny_job, setting=setting).memory.peak)
    scarce = sorted(peaks)[len(peaks) // 4]
    found = Free(scarce, 10**13).cheapest(tiny_job)
    assert found is not None
    assert fit.MARGIN * replace(tiny_job, setting=found).memory.peak <= scarce
    assert Free(1000, 10**13).cheapest(tiny_job) is None


def test_proposals_leave_out_what_cannot_be_and_recorded_signals_come_last(tiny_job: Job) -> None:
    def proposed(**settings: Any) -> list[Setting]:
        return [*proposals(job_of(**settings) if settings else tiny_job)]

    assert [*dict.fromkeys(setting.teacher for setting in proposed())] == ["live", "offloaded", "recorded"]
    assert "recorded" not in {setting.teacher for setting in proposed(losses=(TAID(),))}
    assert not [setting for setting in proposed() if setting.teacher == "offloaded" and setting.stage == 3]
    assert {setting.stage for setting in proposed(precision="bf16-true", deepspeed="zero2")} == {2, 3}
    assert {setting.stage for setting in proposed(lora=Lora(load_in_4bit=True))} == {0, 2}
    assert {setting.stage for setting in proposed(trainer={"torch_compile": True})} == {0, 2}
    cpu = replace(tiny_job, spec=replace(tiny_job.spec, ranks=ONE_RANK))
    assert not any(setting.offload_optimizer or setting.offload_parameters for setting in proposals(cpu))


def test_a_proposal_is_said_in_recipe_keys(tiny_job: Job) -> None:
    assert overrides(tiny_job, tiny_job.setting) == []
    other = replace(
        tiny_job.setting,
        rows=1,
        accumulation=4,
        checkpointing=True,
        stage=2,
        offload_optimizer=True,
        teacher="offloaded",
    )
    assert overrides(tiny_job, other) == [
        "distill.deepspeed={zero_optimization: {stage: 2, offload_optimizer: {device: cpu}}}",
        "distill.trainer.per_device_train_batch_size=1",
        "distill.trainer.gradient_accumulation_steps=4",
        "distill.trainer.gradient_checkpointing=true",
        "distill.teacher={kind: live, offload: true}",
    ]
    assert overrides(tiny_job, replace(tiny_job.setting, stage=3)) == ["distill.deepspeed=zero3"]


def test_disk_counts_one_checkpoint_more_than_is_kept(tiny_job: Job) -> None:
    weights, tokens = tiny_job.student.parameters, tiny_job.spec.num_steps * tiny_job.spec.tokens_per_step
    assert tokens == 100_352  # rounded up to whole steps of 4 ranks, 4 rows, 64 tokens
    assert disk_bytes(tiny_job) == {"checkpoints": 3 * 12 * weights, "distilled": 4 * weights, "text": 11 * tokens}
    trainer = {"max_steps": 1, "num_train_epochs": 3}
    shorter = replace(tiny_job, spec=replace(tiny_job.spec, settings=replace(tiny_job.spec.settings, trainer=trainer)))
    assert disk_bytes(shorter) == disk_bytes(tiny_job), "rows follow the budget of tokens"
    own, elsewhere = (disk_bytes(job_of(teacher=Recorded(path=path))) for path in (None, "signals"))
    assert own["signals"] == 132 * tokens + 8 * tokens // LENGTH
    assert "signals" not in elsewhere
    settings = replace(tiny_job.spec.settings, trainer={"save_strategy": "no"})  # what a stop leaves
    unsaved = replace(tiny_job, spec=replace(tiny_job.spec, settings=settings))
    assert disk_bytes(unsaved)["checkpoints"] == 12 * weights


def refuse(folders: tuple[Path, Path], run_dir: Path, *, is_forced: bool = False, **changes: Any) -> None:
    settings = Distill(sequence_length=LENGTH, watch=None, **changes)
    teacher, student = (Checkpoint.read(folder, LoadSettings()) for folder in folders)
    spec = train_spec(teacher, student, CUT, settings, ONE_RANK)
    check_fit(replace(spec, is_forced=is_forced), run_dir)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Free bytes that a test decides on."""
    free = {"memory": 10**12, "disk": 10**12}
    monkeypatch.setattr(fit, "available_memory", lambda: free["memory"])
    monkeypatch.setattr(fit, "device_memory", lambda device: free["memory"])
    monkeypatch.setattr(fit, "free_disk", lambda path: free["disk"])
    return free


@pytest.mark.slow
def test_a_run_without_the_memory_is_refused_with_what_fits(
    folders: tuple[Path, Path], tmp_path: Path, machine: dict[str, int]
) -> None:
    machine["memory"] = 900_000_000
    with pytest.raises(UserError, match=r"rank\(s\) on this node need .* MB are free; this fits: distill\.") as caught:
        refuse(folders, tmp_path, trainer={"per_device_train_batch_size": 4096})
    assert "`--force` starts the training anyway" in str(caught.value)


@pytest.mark.slow
def test_a_run_without_the_disk_is_refused(folders: tuple[Path, Path], tmp_path: Path, machine: dict[str, int]) -> None:
    machine["disk"] = 1000
    with pytest.raises(UserError, match=r"run_dir .*: training writes .* more at its worst moment and 1 kB are"):
        refuse(folders, tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with (tmp_path / "checkpoints" / "earlier").open("wb") as file:
        file.truncate(10**8)  # a run that goes on has written its files already
    refuse(folders, tmp_path)


@pytest.mark.slow
def test_a_control_without_room_after_the_student_is_refused_and_its_cost_told_before(
    folders: tuple[Path, Path], tmp_path: Path, machine: dict[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="shoal")
    teacher, student = (Checkpoint.read(folder, LoadSettings()) for folder in folders)
    settings = Distill(sequence_length=LENGTH, watch=None)
    spec = train_spec(teacher, student, CUT, settings, ONE_RANK)
    control = control_spec(spec)
    own, uncut = job(spec), job(control)
    assert disk_bytes(uncut).keys() == disk_bytes(own).keys() - {"text"}
    both = sum(disk_bytes(own).values()) + sum(disk_bytes(uncut).values())
    machine["disk"] = both
    check_control(control, tmp_path / "control", spec, tmp_path)
    times = flops_per_token(uncut) / flops_per_token(own)
    assert 1.2 < times < 1.5
    assert f"the teacher is trained on the same rows, which takes {times:.2g} times as long" in caplog.text
    machine["disk"] = both - 1
    with pytest.raises(UserError, match=r"^the control's training \(eval.control\) will not fit: run_dir .*/control: "):
        check_control(control, tmp_path / "control", spec, tmp_path)
    (tmp_path / "distilled").mkdir()
    (tmp_path / "distilled" / "model").write_bytes(b"..")  # of an earlier life
    check_control(control, tmp_path / "control", spec, tmp_path)


@pytest.mark.slow
def test_a_run_that_starts_all_the_same_says_what_is_short(
    folders: tuple[Path, Path], tmp_path: Path, machine: dict[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    machine["disk"] = 1000
    refuse(folders, tmp_path, is_forced=True)
    assert "starts because of --force: run_dir" in caplog.text
