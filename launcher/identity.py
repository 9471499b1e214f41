"""Whether a launch on a run directory starts, continues, refuses or has nothing to do. Pure: facts in, decision out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Existing:
    """The run that is already in the directory."""

    job_id: str
    state: str  # as in launcher/state.py
    step: int  # the last one that it finished
    stopped_early: str = ""  # why it is done before its last step, where the new config would end it so again
    identity_lines: tuple[str, ...]  # what makes it another training: model, data, optimizer, loss, seed, batch
    other_lines: tuple[str, ...]  # what differs without making it another training


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    action: Literal["start", "continue", "done", "refuse"]
    lines: tuple[str, ...] = ()  # for the person
    final: bool = False  # whatever else may be wrong with the config, nothing is started


def decide(
    existing: Existing | None, *, steps_asked: int | None, checkpoint_step: int | None, continue_changed: bool
) -> Decision:
    """`checkpoint_step`: the newest live checkpoint in the store of the new job, None where there is none.
    `steps_asked` None: a script, which alone knows whether there is anything left to do."""
    if existing is None:
        return Decision(action="start" if checkpoint_step is None else "continue")
    if existing.state in ("pending", "running", "stopping", "requeued"):
        return Decision(action="refuse", lines=_alive_lines(existing), final=True)
    if existing.state == "unknown":
        return Decision(action="refuse", lines=_unknown_lines(existing), final=True)
    if existing.identity_lines and not continue_changed:
        if existing.state == "failed" and checkpoint_step is None and steps_asked is not None:
            return Decision(action="continue", lines=_anew(existing))
        return Decision(action="refuse", lines=_changed_lines(existing))
    if steps_asked is None:
        return _of_script(existing)
    if existing.state == "done" and existing.stopped_early:
        go_on = "To train on: train.early_stop=null, or more train.early_stop.patience; --fresh trains anew."
        return Decision(action="done", lines=(f"done already: {existing.stopped_early}. {go_on}",), final=True)
    reached = max(existing.step if existing.state == "done" else 0, _beyond(checkpoint_step, steps_asked))
    if reached >= steps_asked:
        raise_it = "Raise train.steps to go on, or --fresh to train anew."
        line = f"done already: step {reached}, train.steps is {steps_asked}. {raise_it}"
        return Decision(action="done", lines=(line,), final=True)
    return Decision(action="continue", lines=_differs(existing))


def _of_script(existing: Existing) -> Decision:
    """A script that ended with 0 has nothing left to do, unless it is asked for something else."""
    if existing.state == "done" and not existing.identity_lines:
        line = "done already: the script ended with 0. --fresh runs it anew; other arguments need --continue-changed."
        return Decision(action="done", lines=(line,), final=True)
    return Decision(action="continue", lines=_differs(existing))


def _differs(existing: Existing) -> tuple[str, ...]:
    return tuple(f"differs: {line}" for line in (*existing.identity_lines, *existing.other_lines))


def _beyond(checkpoint_step: int | None, steps_asked: int) -> int:
    """A checkpoint after the last step asked leaves nothing to do; one at that very step may still lack the end
    (evaluation, on_end), so that job goes on."""
    return checkpoint_step if checkpoint_step is not None and checkpoint_step > steps_asked else 0


def _alive_lines(existing: Existing) -> tuple[str, ...]:
    return (
        f"job {existing.job_id} is {existing.state} here, at step {existing.step}; nothing was started.",
        "Follow it with `attach`, end it with `cancel`, or train beside it with --fresh or --name NAME.",
    )


def _unknown_lines(existing: Existing) -> tuple[str, ...]:
    return (
        f"whether job {existing.job_id} is still alive can't be told from here; nothing was started.",
        "Ask again from the host that started it, or train beside it with --fresh or --name NAME.",
    )


def _anew(existing: Existing) -> tuple[str, ...]:
    """A mistake in the config that is put right changes it, and there is nothing of the old training to mix up with."""
    return (f"the run before failed at step {existing.step} and saved nothing", *_differs(existing))


def _changed_lines(existing: Existing) -> tuple[str, ...]:
    was = f"the run in this directory ({existing.state} at step {existing.step}) is another training:"
    return (
        was,
        *(f"  {line}" for line in existing.identity_lines),
        "To continue it all the same: --continue-changed. To begin anew beside it: --fresh, or --name NAME.",
    )
