"""A plan as text: tables of memory, disk, network and time, and what they rest on."""

from __future__ import annotations

from typing import Any

from tabulate import tabulate

from launcher.plan.durations import clock
from launcher.plan.estimate import Plan, StageRow
from launcher.plan.phases import CONTEXT_BYTES, FRAGMENTATION, NCCL_BYTES, needed_bytes
from launcher.plan.storage import host_peak
from launcher.plan.traffic import pool_bytes
from shards.files.sizes import size

_HOUR = 3600.0
_WAYS = ("network", "files", "local disks")


def report(plan: Plan) -> str:
    """Return the whole report."""
    return "\n\n".join(
        [
            _head(plan),
            _memory(plan),
            _phases(plan),
            _host(plan),
            _disk(plan),
            _traffic(plan),
            _hours(plan),
            _assumptions(plan),
        ]
    )


def _head(plan: Plan) -> str:
    device = "CPU rank" if plan.gpu.is_cpu else plan.gpu.name
    kept = plan.config.refresh_devices
    lines = [
        f"{plan.nodes} x {plan.ranks_per_node} {device}, {size(plan.gpu.memory_bytes)} each: {plan.world_size} ranks"
        + (f", and {plan.nodes} x {kept} for refreshes beside the ranker's phase" if kept else "")
    ]
    for model, shape in plan.shapes.items():
        section = plan.config.models[model]
        towers = f", {shape.towers} towers" if shape.towers > 1 else ""
        recomputed = ", gradient checkpointing" if section.gradient_checkpointing else ""
        count = f"{shape.weights:,} parameters" + (f", {shape.parameters:,} of them trained" if shape.frozen else "")
        lines.append(
            f"{model}: {shape.name}, {shape.layers} layers of {shape.hidden}{towers}, {count}, "
            f"{section.precision}, ZeRO-{section.zero_stage}{recomputed}"
        )
    corpus = plan.corpus
    lines.append(f"corpus: {corpus.documents:,} documents, {corpus.train:,} training queries")
    lines.append(f"index: {plan.index.factory}, placement {plan.index.placement}")
    lines.append(_in_short(plan))
    return "\n".join(lines)


def _in_short(plan: Plan) -> str:
    fullest = max(plan.phases, key=lambda phase: phase.tensors)
    needed = needed_bytes(fullest, plan.world_size, plan.gpu)
    verdict = "fits" if plan.fits(needed) else "DOES NOT FIT"
    seconds = sum(phase.seconds for phase in plan.hours)
    return (
        f"in short: {verdict}, {size(needed)} of {size(plan.gpu.memory_bytes)} in the fullest phase ({fullest.name}); "
        f"{size(host_peak(plan.host))} of host memory; {size(plan.disk.peak)} of disk; {clock(seconds)}"
    )


def _memory(plan: Plan) -> str:
    rows = [_stage_columns(plan, row) for row in plan.stage_rows]
    title = "Memory of a device while a model trains, in the phase that needs most, by ZeRO stage"
    text = f"{title}\n{_table(rows)}\n* as the recipe has it"
    for model, stage in plan.recommended.items():
        if not any(row.model == model for row in plan.stage_rows):
            continue
        if stage is None:
            text += (
                f"\n{model}: no stage fits. Lower micro_batch_size, set {model}.gradient_checkpointing=true or "
                f"{model}.precision=bf16, or take GPUs with more memory"
            )
        else:
            text += f"\n{model}: ZeRO-{stage} is recommended: of those that fit, the one with the least traffic"
    return text


def _stage_columns(plan: Plan, row: StageRow) -> dict[str, Any]:
    memory, section, opponents = row.memory, plan.config.models[row.model], _opponents(plan)
    frozen = {f"frozen {opponents}": size(memory.opponent) if memory.opponent else ""}
    return {
        "model": row.model,
        "ZeRO": f"{row.stage}{'*' if row.stage == section.zero_stage else ''}",
        "phase": row.work,
        "parameters": size(memory.weights),
        "gradients": size(memory.gradients),
        "optimizer": size(memory.masters + memory.moments),
        "activations": size(memory.activations),
        "buffers": size(memory.bucket + memory.gathered + memory.extra),
        **(frozen if opponents else {}),
        "peak": size(memory.peak),
        "at": memory.worst_moment,
        "needed": size(row.needed),
        "fits": "yes" if plan.fits(row.needed) else "NO",
    }


def _opponents(plan: Plan) -> str:
    """Name the models whose frozen weights lie beside another in training."""
    names = [phase.opponent for phase in plan.config.timetable.phases if phase.opponent is not None]
    return " or ".join(dict.fromkeys(names))


def _phases(plan: Plan) -> str:
    rows = []
    for phase in plan.phases:
        needed = needed_bytes(phase, plan.world_size, plan.gpu)
        rows.append(
            {
                "phase": phase.name,
                "what lies on the device": ", ".join(f"{what} {size(part)}" for what, part in phase.parts.items()),
                "needed": size(needed),
                "fits": "yes" if plan.fits(needed) else "NO",
            }
        )
    return f"Memory of a device by phase, with the stages of the recipe\n{_table(rows)}"


def _host(plan: Plan) -> str:
    rows = [{"what": what, "bytes": size(part), "": how} for what, (part, how) in plan.host.items() if part]
    peak, is_local = host_peak(plan.host), plan.disk.gathered is not None
    held, there = plan.disk.embeddings / (plan.nodes if is_local else 1), " that lie here" if is_local else ""
    return (
        f"Memory of the host with rank 0\n{_table(rows)}\nat most at a time: {size(peak)}; beside it the page cache "
        f"wants to hold the embeddings{there}, {size(held)}, from which hits are re-scored"
    )


def _disk(plan: Plan) -> str:
    rows = [{"what": what, "bytes": size(part), "": how} for what, (part, how) in plan.disk.parts.items()]
    text = f"Disk of the run folder, at its fullest\n{_table(rows)}\ntogether: {size(plan.disk.peak)}"
    if local := plan.disk.local_bytes:
        each = f"about {size(local / plan.nodes)} on each of {plan.nodes}" if plan.nodes > 1 else "on the one"
        text += f"\non the hosts' own disks (index.local_folder): {size(local)} of embeddings, {each}"
    return text


def _traffic(plan: Plan) -> str:
    rows = [
        {
            "what": row.what,
            "way": row.way,
            "per rank": size(row.per_rank),
            "all ranks": size(row.total),
            "": row.how,
        }
        for row in plan.traffic
        if row.total >= 1
    ]
    text = f"Moved in one iteration\n{_table(rows)}\n"
    for work in plan.works:
        shared = pool_bytes(work, plan.shapes[work.model].dimension, plan.world_size)
        steps, phase = work.phase.total_steps, "the warm-up" if work.phase.is_warmup else f"the {work.name} phase"
        if shared:
            text += f"in each of the {steps} steps of {phase} a rank also sends {size(shared)} of embeddings\n"
    sums = {way: sum(row.total for row in plan.traffic if row.way == way) for way in _WAYS}
    text += f"between ranks {size(sums['network'])}, to and from the shared file system {size(sums['files'])}"
    return text + (f", on the hosts' own disks {size(sums['local disks'])}" if sums["local disks"] else "")


def _hours(plan: Plan) -> str:
    total = sum(phase.seconds for phase in plan.hours)
    unit = "rank hours" if plan.gpu.is_cpu else "GPU hours"
    rows = [
        {
            "phase": phase.name,
            "times": phase.times,
            "each": clock(phase.seconds / phase.times),
            "hours": f"{phase.seconds / _HOUR:.3g}",
            unit: f"{phase.seconds / _HOUR * plan.num_devices:.3g}",
            "FLOP": f"{phase.flops:.3g}" if phase.flops else "",
            "": phase.how,
        }
        for phase in plan.hours
    ]
    return (
        f"Time\n{_table(rows)}\ntogether: {clock(total)}, {total / _HOUR * plan.num_devices:.3g} {unit}; an "
        "estimate of the order, see the assumptions"
    )


def _assumptions(plan: Plan) -> str:
    precisions = {str(section.precision) for section in plan.config.models.values()}
    lines = [*plan.rates.assumptions(plan.gpu, precisions), *plan.corpus.sources]
    if not plan.gpu.is_cpu:
        lines.insert(
            0,
            f"a device: CUDA's context {size(CONTEXT_BYTES)}, NCCL {size(NCCL_BYTES)} with more than one rank, "
            f"{FRAGMENTATION:.0%} of the tensors lost to fragmentation, and nothing else runs on it",
        )
    if plan.postings is not None:
        lines.append(
            f"lexical retrievers: {plan.corpus.terms:g} terms a document (--document-terms); a rank scores "
            f"{plan.rates.postings_scored / 1e6:g} million passages a second on one core by scipy, some four times as "
            "many where numba is installed"
        )
    for model, shape in plan.shapes.items():
        section = plan.config.models[model]
        if not shape.plain:
            lines.append(f"{model}: its layers are taken for BERT's in activations and FLOP; they are not")
        if section.name == "random":
            lines.append(f"{model}: a full vocabulary of random_model.vocab_size; the corpus may have fewer words")
        elif shape.name != section.name:
            lines.append(f"{model}: {section.name} is taken to have the shape {shape.name}")
    return "Assumed\n" + "\n".join(f"- {line}" for line in lines)


def _table(rows: list[dict[str, Any]]) -> str:
    return tabulate(rows, headers="keys", tablefmt="simple", disable_numparse=True, stralign="left")
