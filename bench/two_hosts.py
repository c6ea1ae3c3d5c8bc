"""Two hosts in network namespaces, a process on each: `accelerate launch` of `addenda tune`, against one process.

The hosts are joined by a pair of virtual cables and share nothing else on purpose: each has its own copy of the model
and the data, its own folder of runs and its own cache. Only the first host's folder is written to. The first run is
killed on the second host at a step, where the first one ends too; the same launch on both goes on.
Wants root and `ip` (iproute2), as a person who makes namespaces does.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench import tiny

STEPS, EVERY = 40, 5
NAMES = ("addenda-a", "addenda-b")
ENDS = ("addenda-v0", "addenda-v1")
ADDRESSES = ("10.213.7.1", "10.213.7.2")
KINDS = {"ddp": ("--multi_gpu",), "fsdp2": ("--use_fsdp", "--fsdp_version", "2")}
TUNE = ("--model", "model", "--data", "sums.jsonl", "--dtype", "float32", "--batch", "8", "--steps", str(STEPS),
        "--eval", "0.25", "--method", "lora", "--attention", "sdpa", "--out", "out")  # fmt: skip


def possible() -> str:
    """Return why namespaces cannot be made here; "" where they can."""
    if shutil.which("ip") is None:
        return "there is no `ip` (apt-get install iproute2)"
    made = subprocess.run(["ip", "netns", "add", "addenda-probe"], capture_output=True, text=True)
    if made.returncode:
        return made.stderr.strip() or "ip netns add failed"
    inside = subprocess.run(["ip", "netns", "exec", "addenda-probe", "true"], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "delete", "addenda-probe"], check=True)
    return inside.stderr.strip()


def run(given) -> tuple[dict, str]:
    if why := possible():
        raise SystemExit(f"No network namespace can be made here: {why}.")
    with tempfile.TemporaryDirectory(prefix="addenda-hosts-") as place:
        found = compare(Path(place), list(KINDS))
    lines = ["| | tensors off | merged change off | ended after the kill | went on from | second host wrote |"]
    lines += ["| --- | --- | --- | --- | --- | --- |"]
    for kind, row in found.items():
        lines.append(
            f"| {kind} | {row['tensors']:.1e} | {row['merged']:.1e} | {row['ended_seconds']:.0f} s "
            f"| step {row['resumed_from']} | {', '.join(row['second_wrote']) or 'nothing'} |"
        )
    return found, "\n".join(lines)


def compare(place: Path, kinds: list[str]) -> dict[str, Any]:
    """Return, for each way of splitting, how far two hosts are from one process, and what a kill did."""
    one = place / "one"
    one.mkdir()
    tiny.write(one)
    subprocess.run([sys.executable, "-m", "addenda", "tune", *TUNE], cwd=one, env=variables(one), check=True)
    cable()
    try:
        return {kind: of(kind, place, one) for kind in kinds}
    finally:
        for name in NAMES:
            subprocess.run(["ip", "netns", "delete", name], check=False)


def of(kind: str, place: Path, one: Path) -> dict[str, Any]:
    """Kill the second host of a run, run both again, and return how far the result is from one host's."""
    hosts = [place / f"{kind}-{rank}" for rank in range(2)]
    for host in hosts:
        host.mkdir()
        tiny.write(host)
    running = launch(kind, hosts)
    kept = hosts[0] / "out" / "checkpoints" / f"checkpoint-{3 * EVERY}"
    wait(lambda: kept.is_dir() or any(p.poll() is not None for p in running))
    assert kept.is_dir(), [(host / "log").read_text()[-3000:] for host in hosts]
    started = time.monotonic()
    for pid in subprocess.run(["ip", "netns", "pids", NAMES[1]], capture_output=True, text=True).stdout.split():
        os.kill(int(pid), signal.SIGKILL)  # the launcher of the second host, and what it started
    codes = [process.wait(timeout=300) for process in running]
    ended = time.monotonic() - started
    assert codes[0] not in (0, None), "the first host must not go on alone"
    running = launch(kind, hosts)
    codes = [process.wait(timeout=300) for process in running]
    assert codes == [0, 0], [(host / "log").read_text()[-3000:] for host in hosts]
    record = json.loads((hosts[0] / "out" / "run.json").read_text())
    assert record["resumed_from"] > 0 and record["steps"] == STEPS
    tensors, merged = off(hosts[0], one)
    wrote = sorted(str(p.relative_to(hosts[1])) for p in hosts[1].rglob("*") if "out" in p.parts)
    return {"tensors": tensors, "merged": merged, "ended_seconds": ended, "resumed_from": record["resumed_from"],
            "second_wrote": wrote}  # fmt: skip


def cable() -> None:
    """Make two namespaces, joined by a pair of virtual cables."""
    for name in NAMES:
        subprocess.run(["ip", "netns", "delete", name], capture_output=True)  # of a run that was killed
        subprocess.run(["ip", "netns", "add", name], check=True)
    subprocess.run(["ip", "link", "add", ENDS[0], "type", "veth", "peer", "name", ENDS[1]], check=True)
    for name, end, address in zip(NAMES, ENDS, ADDRESSES, strict=True):
        subprocess.run(["ip", "link", "set", end, "netns", name], check=True)
        subprocess.run(["ip", "-n", name, "addr", "add", f"{address}/24", "dev", end], check=True)
        for each in (end, "lo"):
            subprocess.run(["ip", "-n", name, "link", "set", each, "up"], check=True)


def launch(kind: str, hosts: list[Path]) -> list[subprocess.Popen]:
    """Start the launcher of every host, each in its namespace."""
    running = []
    for rank, (name, host) in enumerate(zip(NAMES, hosts, strict=True)):
        command = [
            "ip", "netns", "exec", name, sys.executable, "-m", "accelerate.commands.launch", *KINDS[kind],
            "--num_machines", "2", "--num_processes", "2", "--machine_rank", str(rank),
            "--main_process_ip", ADDRESSES[0], "--main_process_port", "29571", "--mixed_precision", "no",
            "--dynamo_backend", "no", "-m", "addenda", "tune", *TUNE,
        ]  # fmt: skip
        network = {"GLOO_SOCKET_IFNAME": ENDS[rank]}  # both have one host name, which leads nowhere from inside
        with (host / "log").open("a") as log:
            running.append(subprocess.Popen(command, cwd=host, env=variables(host) | network, stdout=log, stderr=log))
    return running


def variables(host: Path) -> dict[str, str]:
    """Return the environment of a host's processes: a cache of its own, one thread."""
    root = Path(__file__).parents[1]
    return os.environ | {"ADDENDA_CACHE": str(host / "cache"), "PYTHONPATH": str(root / "src"), "OMP_NUM_THREADS": "1"}


def wait(until, seconds: float = 300) -> None:
    """Wait until something is so. Raises AssertionError where it is not in time."""
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end, "the hosts did not begin"
        time.sleep(0.05)


def off(host: Path, one: Path) -> tuple[float, float]:
    """Return the largest relative difference of a tensor of the adapters, and of a weight's change."""
    import torch
    from safetensors.torch import load_file

    import addenda as ad
    from addenda.models.load import load_model

    changes, files = [], [folder / "out" / "adapter.safetensors" for folder in (host, one)]
    for file in files:
        model = load_model(str(one / "model"), task="causal", dtype="float32").model
        before = {k: t.clone() for k, t in model.state_dict().items()}
        ad.load(model, file)
        ad.merge(model)
        after = model.state_dict()
        changes.append({k: after[k] - t for k, t in before.items() if not torch.equal(after[k], t)})
    pairs = [[load_file(file) for file in files], changes]
    assert all(a.keys() == b.keys() for a, b in pairs)
    found = [max(float((a[k] - b[k]).norm() / b[k].norm().clamp_min(1e-12)) for k in b) for a, b in pairs]
    return found[0], found[1]
