"""Event files under <run>/tensorboard. Steps that a new attempt computes again replace those of the attempt before:
each file begins with TensorBoard's own mark for that, a session start with a step (what purge_step is in torch's
SummaryWriter).
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from dtrain.cluster.rundir import RunDir, read_json, write_atomic
from dtrain.runtime.tracking.process import Record, flat_numbers

DT_STRING = 7  # tensorboard/compat/proto/types.proto


class TensorBoardTracker:
    def __init__(self, run: RunDir, start_step: int) -> None:
        folder = run.path / "tensorboard"
        folder.mkdir(exist_ok=True)
        self._position = folder / "position.json"
        known = read_json(self._position)
        # What belongs to the newest step, or to the step that the run goes on from, may be there in part: its
        # evaluation is made again. So that step is given once more.
        self._first_step = 1 if known is None else min(int(known["newest_step"]), max(1, start_step))
        self._writer = EventFileWriter(str(folder))
        start = SessionLog(status=SessionLog.START)
        self._writer.add_event(Event(wall_time=time.time(), step=self._first_step, session_log=start))
        if known is None:
            self._writer.add_event(_text("config", run.config.read_text()))

    def log(self, records: Sequence[Record]) -> None:
        newest = 0
        for record in records:
            step = int(record["step"])
            if step < self._first_step:
                continue
            values = [Summary.Value(tag=name, simple_value=number) for name, number in flat_numbers(record).items()]
            self._writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
            newest = max(newest, step)
        self._writer.flush()
        if newest:
            write_atomic(self._position, json.dumps({"newest_step": newest}))

    def close(self) -> None:
        self._writer.close()


def _text(tag: str, text: str) -> Event:
    """As TensorBoard's text plugin shows it, in a code block."""
    tensor = TensorProto(dtype=DT_STRING, string_val=[f"```yaml\n{text}\n```".encode()])
    metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
    value = Summary.Value(tag=tag, metadata=metadata, tensor=tensor)
    return Event(wall_time=time.time(), step=0, summary=Summary(value=[value]))
