"""TensorBoard files in run_dir/tensorboard."""

from pathlib import Path

import torch

from olmoe_train.run.sinks.base import Record
from olmoe_train.run.sinks.pictures import flow_map, load_map


class TensorBoardSink:
    name = "TensorBoard"

    def __init__(self, run_dir: Path, step: int) -> None:
        """step: the step that the run continues from; TensorBoard forgets the later ones. 0 for a new run."""
        from torch.utils.tensorboard import SummaryWriter  # needs the extra tensorboard

        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1 if step else 0)
        self._step = step

    def write(self, record: Record) -> None:
        writer, values = self._writer, record.values
        self._step, at = record.step, {"global_step": record.step, "walltime": values["time"]}
        for name, number in record.numbers.items():
            writer.add_scalar(name, number, **at)
        for name, parts in values.items():
            if name.endswith("loss_by_position"):
                for part, loss in enumerate(parts):
                    if loss is not None:
                        writer.add_scalar(f"{name}/{part:02d}", loss, **at)
        if record.has_details and (loads := record.loads):
            writer.add_image("router/load_map", load_map(loads), dataformats="HWC", **at)
            for layer, load in enumerate(loads):
                writer.add_histogram(f"router/layer_{layer:02d}/load", torch.tensor(load), **at)
        if record.flow_LEE is not None:
            writer.add_image("router/flow", flow_map(record.flow_LEE.numpy()), dataformats="HWC", **at)
        for number, sample in enumerate(values.get("eval/samples", [])):
            text = f"{sample['prompt']}\n\n{sample['completion']}"
            writer.add_text(f"eval/samples/{number}", text, **at)

    def alert(self, name: str, text: str) -> None:
        self._writer.add_text(f"alerts/{name}", text, global_step=self._step)

    def close(self) -> None:
        self._writer.close()
