"""`compress`: encodes a checkpoint tensor by tensor, and goes on where a killed run ended."""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Generator, Mapping
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from torchcodec_weights.calibration.blocks import NotByBlocksError
from torchcodec_weights.config import CodecWeightOnlyConfig
from torchcodec_weights.convert.calibration import (
    SELF,
    BlockCalibration,
    by_blocks,
    has_begun,
    memory_of_feedback,
)
from torchcodec_weights.convert.card import model_card
from torchcodec_weights.convert.encoded import digest_of_source, encode_part, memory_of
from torchcodec_weights.convert.output import FILE_MARK, check_output, check_replaceable, write_list
from torchcodec_weights.convert.plan import (
    Choice,
    Plan,
    PlannedFile,
    Task,
    make_plan,
    read_file,
    shares,
)
from torchcodec_weights.convert.shard import checksum_of_source, write_shard
from torchcodec_weights.convert.source import INDEX, Source
from torchcodec_weights.convert.work import Work
from torchcodec_weights.format.safetensors import read_header
from torchcodec_weights.models import quantize
from torchcodec_weights.models.checkpoint import load_folder
from torchcodec_weights.models.huggingface import copy_other_files, read_small_files, save_config
from torchcodec_weights.models.report import report_tensors
from torchcodec_weights.system.memory import release_freed, resident

_BESIDE = 2**26  # bytes for threads, compiled code and what malloc keeps


@dataclass(frozen=True)
class Limits:
    """How a run goes about its work; the output does not depend on it.

    Attributes:
        max_memory: bytes that the process may take; None for twice the largest tensor in float32
            and 1 GiB.
        delete_source: whether each file of the source is deleted when its output is durable.
        force: whether what is there may be replaced.
        worker: number and count of workers, of which this one encodes its share and no more; None
            to encode what is missing and to finish the output.
    """

    max_memory: int | None = None
    delete_source: bool = False
    force: bool = False
    worker: tuple[int, int] | None = None


class NothingEncodedError(ValueError):
    """Every weight would stay dense."""

    def __init__(self) -> None:
        super().__init__(
            "no weight was encoded: the warnings say why each stays dense. Nothing was written. "
            "Allowed: a target that a weight can reach"
        )


class Run:
    """One call of `compress`."""

    def __init__(self, source: Source, out: Path, choice: Choice, limits: Limits) -> None:
        self._source = source
        self._choice = choice
        self._limits = limits
        self._work = Work(out, is_file=source.is_file)
        self._out = out
        self._settings = _settings(choice)
        self._numbers: dict[str, int] = {}

    def __call__(self) -> bool:
        """Encode what is missing, and finish the output; or only a worker's share.

        Returns:
            Whether the output is whole.

        Raises:
            ValueError: the run began with other settings or another source, and what differs; or
                the source cannot be encoded (`make_plan`); or OUT must not be replaced.
            NotByBlocksError: as `encode`.
            RateError, CodecError, OSError: as `encode_part`. What is finished is kept.
        """
        worker, work = self._limits.worker, self._work
        if work.is_whole:
            with work.locked(None):
                settings = work.publish_whole()
            if not self._differences(settings):
                return True
        check_output(
            self._out, self._source.place, is_file=self._source.is_file, force=self._limits.force
        )
        with work.locked(worker):
            try:
                with work.exclusively("begin"):
                    plan = self.begin()
                self.encode(plan, self._mine(plan))
                if worker is not None:
                    return False
                self.finish(plan)
            except NothingEncodedError:
                work.remove()
                raise
            except NotByBlocksError:
                if worker is None and not work.has_parts():
                    work.remove()
                raise
            except BaseException:
                # Another worker may be about to write the first part.
                if worker is None and not (work.has_parts() or has_begun(work.calibration)):
                    work.remove()
                raise
        return True

    @property
    def _is_calibrated(self) -> bool:
        return self._choice.calibrate is not None and not self._choice.data_free

    def _mine(self, plan: Plan) -> list[Task]:
        """The tensors that this run encodes; with calibration by blocks, as each of them is run."""
        worker = self._limits.worker
        if worker is None:
            return [*plan.tasks.values()]
        groups = by_blocks(plan) if self._is_calibrated else [[t] for t in plan.tasks.values()]
        return shares(groups, worker[1])[worker[0]]

    def begin(self) -> Plan:
        """Read the source and its plan; go on with a run, or begin one."""
        work, source = self._work, self._source
        if work.exists() and self._limits.force and not self._can_go_on():
            work.remove()
            work.root.mkdir(exist_ok=True)
        resumed = work.exists()
        if not resumed:
            work.clear()
        small = source.small_files(work.small)
        if not source.is_file:
            config = read_small_files(small)
            if "quantization_config" in config:
                raise ValueError(f"MODEL={source.text!r} is quantized already: allowed: dense")
        if resumed:
            if differences := self._differences(work.manifest()["settings"]):
                raise ValueError(
                    f"OUT={str(self._out)!r} was begun with other settings: "
                    f"{'; '.join(differences)}: allowed: the same, or --force to begin anew"
                )
            files = [work.kept(name) for name in work.manifest()["files"]]
        else:
            files = [read_file(source, name) for name in source.weight_files(small)]
        if self._limits.delete_source:
            for file in files:
                source.check_deletable(file.name)
        plan = make_plan(source, files, small, self._choice)
        self._numbers = {name: number for number, name in enumerate(plan.tasks)}
        if not resumed:
            work.begin(self._settings, files)
            return plan
        return self._same_source(plan)

    def _can_go_on(self) -> bool:
        """Whether the run in the working directory had these settings and this source."""
        try:
            same = not self._differences(self._work.manifest()["settings"])
            if same:
                for name, known in self._work.manifest()["files"].items():
                    with suppress(FileNotFoundError):
                        same &= self._source.version(name) == known["version"]
        except (ValueError, LookupError, OSError):
            return False
        return same

    def _differences(self, before: Mapping[str, Any]) -> list[str]:
        now = self._settings
        return [
            f"{key} was {before.get(key)!r} and is {now.get(key)!r}"
            for key in sorted({*before, *now})
            if before.get(key) != now.get(key)
        ]

    def _same_source(self, plan: Plan) -> Plan:
        """The plan with the source's files as they are now, which must hold what they held."""
        work, source = self._work, self._source
        files = {}
        for name, kept in plan.files.items():
            try:
                now = read_file(source, name)
            except FileNotFoundError:
                if work.done(name) is None:
                    raise
                now = kept  # deleted, as its output is whole
            for what, before, after in (
                ("size", kept.size, now.size),
                ("header", kept.digest, now.digest),
            ):
                if before != after:
                    raise _changed(source, name, f"{what} was {before} and is {after}")
            if kept.version != now.version:
                self._check_contents(plan, name)
            files[name] = now
        if any(files[name].version != kept.version for name, kept in plan.files.items()):
            if self._is_calibrated and self._limits.worker is not None:
                raise ValueError(
                    f"{source.text} was written to since OUT was begun, and other workers may use "
                    "what was found of it: allowed: the same command without --worker, or the "
                    "same source"
                )
            # What was found of the whole model is not compared: it is found again.
            shutil.rmtree(work.calibration, ignore_errors=True)
            work.update(self._settings, [*files.values()])
        return replace(plan, files=files)

    def _check_contents(self, plan: Plan, file: str) -> None:
        """Compare what is finished of a file that was written to with what it holds now."""
        source, done = self._source, self._work.done(file)
        for task in plan.tasks_of(file):
            part = self._work.part(self._numbers[task.name])
            before = done.encoded[task.name][0] if done else (part.source_sha256 if part else None)
            if before is not None and digest_of_source(source, task) != before:
                raise _changed(source, file, f"its tensor {task.name!r} was another")
        for name, checksum in (done.copied if done else {}).items():
            stored = plan.files[file].header.tensors[name]
            if checksum_of_source(source, file, stored) != checksum:
                raise _changed(source, file, f"its tensor {name!r} was another")

    def encode(self, plan: Plan, mine: list[Task]) -> None:
        """Encode tensors that are not finished, and put files together that then are whole.

        Raises:
            NotByBlocksError: the weights are to be calibrated, and the model cannot be run so.
        """
        work = self._work
        missing = [
            task
            for task in mine
            if not work.done(task.file) and work.part(self._numbers[task.name]) is None
        ]
        self._budget(missing)  # too little is told before the model is tried
        groups = self._groups(plan, missing)
        budget = self._budget(missing)
        total = sum(task.weights for task in missing)
        bar = tqdm(total=total, desc="encoding", unit="w", unit_scale=True, disable=not missing)
        left = Counter(task.file for task in missing)
        if self._limits.worker is None:  # of many, none may remove parts
            for name in plan.files:
                if not left[name]:
                    self._assemble(plan, name)
        with bar, closing(groups):
            for group in groups:
                self._encode_group(plan, group, budget, left, bar)

    def _groups(self, plan: Plan, missing: list[Task]) -> Generator[list[Task]]:
        """Tensors that are encoded together."""
        if not self._is_calibrated or not missing:
            return (group for group in [missing])
        work, limits = self._work, self._limits
        # The first of several workers finds statistics; the others wait, and have them then.
        with work.exclusively("calibrate"):
            calibration = BlockCalibration(
                self._source, plan, self._choice, work.calibration, limits.max_memory
            )
            calibration.collect()
        return calibration.tasks(missing, alone=limits.worker is None)

    def _encode_group(
        self,
        plan: Plan,
        group: list[Task],
        budget: int,
        left: Counter[str],
        bar: tqdm,
    ) -> None:
        tasks = {
            quantize.Task(
                task.weights,
                self._memory_of(task),
                partial(
                    encode_part,
                    self._source,
                    task,
                    self._work.part_path(self._numbers[task.name]),
                ),
            ): task
            for task in group
        }
        with closing(quantize.run_tasks(tasks, budget, bar.refresh)) as results:
            for running, _ in results:
                bar.update(running.weights)
                release_freed()
                name = tasks[running].file
                left[name] -= 1
                if not left[name] and self._limits.worker is None:
                    self._assemble(plan, name)

    def _memory_of(self, task: Task) -> int:
        return memory_of(task) + (memory_of_feedback(task) if self._is_calibrated else 0)

    def _budget(self, missing: list[Task]) -> int:
        """Bytes that tensors may take beside what the process has."""
        largest = max(missing, key=self._memory_of, default=None)
        most = max((task.weights for task in missing), default=0)
        asked, here = self._limits.max_memory, resident() + _BESIDE
        if asked is not None and largest is not None and here + self._memory_of(largest) > asked:
            raise ValueError(
                f"--max-memory={asked / 2**30:.2f} GiB: allowed: "
                f"{(here + self._memory_of(largest)) / 2**30:.2f} GiB or more, for {largest.name}"
            )
        return (asked or 8 * most + 2**30) - here

    def _assemble(self, plan: Plan, name: str) -> None:
        """Put a file together whose tensors are finished, and remove what is not needed then."""
        numbers = {task.name: self._numbers[task.name] for task in plan.tasks_of(name)}
        if self._work.done(name) is None:
            self._write_file(plan, plan.files[name], numbers)
        for number in numbers.values():
            self._work.part_path(number).unlink(missing_ok=True)
        if self._limits.delete_source and not self._source.is_file:
            with suppress(FileNotFoundError):
                self._source.delete(name)

    def _write_file(self, plan: Plan, file: PlannedFile, numbers: Mapping[str, int]) -> None:
        parts = {}
        for name, number in numbers.items():
            part = self._work.part(number)
            if part is None or not part.is_intact():
                path = self._work.part_path(number)
                path.unlink(missing_ok=True)
                raise OSError(
                    f"{path}, the finished {name}, was damaged and is removed: the same command "
                    "again encodes it anew"
                )
            parts[name] = part
        marks = FILE_MARK if self._source.is_file else {}
        written = self._work.new / f"{file.name}.tmp"
        try:
            done = write_shard(written, self._source, file, parts, [*plan.tasks], marks)
        except BaseException:
            written.unlink(missing_ok=True)
            raise
        if self._source.version(file.name) != file.version:
            raise _changed(self._source, file.name, "it was written to while it was read")
        self._work.finish_file(file.name, written, done)

    def finish(self, plan: Plan) -> None:
        """Write the small files of the output, and give it its name."""
        work = self._work
        done = {name: work.done(name) for name in plan.files}
        if lost := [name for name, found in done.items() if found is None]:
            raise OSError(f"{work.new / lost[0]} is not there any more: begin anew with --force")
        encoded = {n: hashes for d in done.values() if d for n, hashes in d.encoded.items()}
        if not any(decoded for _, decoded in encoded.values()):
            raise NothingEncodedError
        check_replaceable(self._out, force=self._limits.force)
        if plan.model is not None:
            self._write_small_files(plan, encoded)
        work.publish(self._settings, [*plan.files])
        if self._limits.delete_source and self._source.is_file:
            self._source.delete(next(iter(plan.files)))

    def _write_small_files(self, plan: Plan, encoded: Mapping[str, tuple[str, str]]) -> None:
        """All of a directory but its weights: configuration, index, card, list."""
        source, folder, choice = self._source, self._work.new, self._choice
        save_config(plan.model, folder, choice.config, embeddings=choice.has_embeddings(plan.model))
        small = source.small_files(self._work.small)
        if (small / INDEX).exists():
            _write_index(folder, [*plan.files])
        report = report_tensors(load_folder(folder).items())
        former = small / "README.md"
        text = former.read_text(encoding="utf-8", errors="replace") if former.is_file() else ""
        kind = type(plan.model).__name__
        card = model_card(source.text, self._settings, report, text, kind)
        (folder / "README.md").write_text(card, encoding="utf-8")
        copy_other_files(small, folder)
        write_list(
            folder,
            {
                "settings": self._settings,
                "source": {
                    file.name: {"size": file.size, "header_sha256": file.digest}
                    for file in plan.files.values()
                },
                "weights": {
                    name: {"source_sha256": source_hash, "decoded_sha256": decoded_hash}
                    for name, (source_hash, decoded_hash) in sorted(encoded.items())
                },
            },
        )


def _write_index(folder: Path, files: list[str]) -> None:
    """The index by which transformers finds the tensors of several files."""
    places: dict[str, str] = {}
    size = 0
    for name in files:
        header = read_header(folder / name)
        size += header.total_size - header.size
        places.update(dict.fromkeys(header.tensors, name))
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _settings(choice: Choice) -> dict[str, Any]:
    """What an output depends on, beside its source; plain values of JSON."""
    embeddings = choice.embeddings
    return {
        **_given(choice.config),
        "include": choice.include,
        "exclude": choice.exclude,
        "embeddings": None if embeddings is None else _given(embeddings),
        **_calibration_setting(choice),
        "torchcodec_weights": version("torchcodec-weights"),
    }


def _given(config: CodecWeightOnlyConfig) -> dict[str, Any]:
    return {key: value for key, value in asdict(config).items() if value not in (None, {})}


def _calibration_setting(choice: Choice) -> dict[str, str]:
    if choice.calibrate is None:
        return {}
    if choice.calibrate == SELF:
        return {"calibrate": SELF}
    digest = hashlib.sha256(Path(choice.calibrate).read_bytes()).hexdigest()
    return {"calibrate": f"text with the SHA-256 {digest}"}


def _changed(source: Source, name: str, how: str) -> ValueError:
    return ValueError(
        f"{source.text}/{name} changed since OUT was begun: {how}: allowed: the same source, or "
        "--force to begin anew"
    )
