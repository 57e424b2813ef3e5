"""The benchmarks run, at a tiny size and with timing off, and their arithmetic is right."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import orbax_async as ocp
from benchmarks import (
    __main__,
    commands,
    figures,
    footprint,
    gpu,
    measures,
    peers,
    processes,
    raw,
    report,
    rounds,
    scaling,
    trees,
    tuning,
    workloads,
)
from benchmarks.figures import Spread
from benchmarks.peers import PEERS, Done, Peer

# Orbax's threads, and those of other libraries, stay.
pytestmark = [
    pytest.mark.leaves_threads,
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.skipif(sys.platform != "linux", reason="the benchmarks read Linux's counters"),
]

ROOT = Path(__file__).parents[2]
PNG = b"\x89PNG"
TINY = {"gpt2": 0.02, "leaves-2000": 0.01, "leaves-10000": 0.002, "sharded": 0.0005}
ONCE = {"timed": 1, "memory": 1, "gap": 1, "pace": 1, "apart": 1}
INSTALLED = [name for name, peer in PEERS.items() if peer.is_installed]


@pytest.fixture(autouse=True)
def no_settling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turns timing off: nothing is collected and synced to make figures comparable."""
    monkeypatch.setattr(measures, "settle", lambda: None)


def tiny(name: str) -> Any:
    """Returns the state of a workload at a size that takes no time."""
    return workloads.WORKLOADS[name].make(TINY.get(name, 0.0002))


def trial(peer: Peer, path: Path, state: Any, **more: Any) -> measures.Trial:
    """Returns what one peer does with a state."""
    return measures.Trial(
        peer=peer, path=path / "turn", state=state, abstract=trees.abstract_of(state), **more
    )


def record_of(turns: dict[str, dict[str, list[float]]], floors: tuple[str, ...] = ()) -> Any:
    """Returns a record with the given figures: by peer, by measure, one for each round."""
    about = {"durable": "all", "version": "1", "left_out": ""}
    return {
        "kind": "run",
        "workload": "made:up",
        "about": "by hand",
        "leaves": 1,
        "nbytes": 1 << 20,
        "is_cold": False,
        "machine": {
            "cpu": "a CPU",
            "cores": 2,
            "memory_nbytes": 1 << 30,
            "disk": "a disk",
            "load_average": 0.0,
            "python": "3",
            "packages": {"jax": "1"},
        },
        "peers": {name: about | {"is_floor": name in floors} for name in turns},
        "turns": [
            {"kind": "timed", "round": number, "peer": name, "figures": {measure: value}}
            for name, found in turns.items()
            for measure, values in found.items()
            for number, value in enumerate(values)
        ],
    }


# ------------------------------------------------------------------------ workloads and peers


@pytest.mark.parametrize("name", workloads.WORKLOADS)
def test_every_peer_gives_a_workload_back(name: str, tmp_path: Path) -> None:
    """Each installed peer saves each workload, and what it loads has the same bits."""
    state = tiny(name)
    assert jax.tree.leaves(state)
    for peer in INSTALLED:
        one = trial(PEERS[peer], tmp_path, state, settings=workloads.WORKLOADS[name].settings)
        measures.first(one)
        one.clear()


def test_gpt2_has_the_shapes_of_gpt2() -> None:
    """At its full size the workload has GPT-2's 124 million parameters and Adam's moments."""
    small = workloads.gpt2(1 / 12)
    shapes = jax.eval_shape(lambda: small)
    assert len(jax.tree.leaves(shapes)) == 3 * (12 + 4) + 2
    layers, width, vocabulary, context = 12, 768, 50257, 1024
    block = 12 * width * width + 13 * width
    parameters = vocabulary * width + context * width + layers * block + 2 * width
    assert parameters == 124_439_808
    width = 64
    counted = sum(leaf.size for leaf in jax.tree.leaves(small["params"]))
    rows = round(50257 / 12) + round(1024 / 12)
    assert counted == rows * width + 12 * width * width + 13 * width + 2 * width


def test_a_peer_that_loads_other_values_is_refused(tmp_path: Path) -> None:
    """The comparison sees one flipped bit, another dtype, NumPy for jax, and other containers."""
    state = {"w": jnp.arange(6.0), "step": 7}
    changed = [
        {"w": jnp.arange(6.0).at[3].set(-0.5), "step": 7},
        {"w": jnp.arange(6), "step": 7},
        {"w": np.arange(6, dtype=np.float32), "step": 7},
        {"w": jnp.arange(6.0), "step": 8},
        {"w": jnp.arange(6.0), "other": 7},
    ]
    for other in changed:
        wrong = replace(PEERS["raw-1"], load=lambda *_, o=other: o, matches=trees.same_values)
        with pytest.raises(ValueError, match="other values"):
            measures.first(trial(wrong, tmp_path, state))
    trial(PEERS["raw-1"], tmp_path, state).clear()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_floor_stores_every_byte(threads: int, tmp_path: Path) -> None:
    """Raw files hold the leaves one after the other, divided evenly, and a lost byte is seen."""
    state = {"a": np.arange(7, dtype=np.uint8), "b": jnp.arange(5, dtype=jnp.int32), "c": 3}
    raw.write(tmp_path / "raw", state, threads)
    files = [(tmp_path / "raw" / str(index)).read_bytes() for index in range(threads)]
    whole = state["a"].tobytes() + np.arange(5, dtype=np.int32).tobytes() + np.int64(3).tobytes()
    assert b"".join(files) == whole
    assert max(map(len, files)) - min(map(len, files)) <= 1
    loaded = raw.read(tmp_path / "raw", state, threads)
    assert raw.same_content(loaded, state)
    loaded[9] ^= 1
    assert not raw.same_content(loaded, state)


def test_sizes_count_replicas_where_they_take_memory(mesh8: jax.sharding.Mesh) -> None:
    """Each element is stored once; in memory each replica counts that has its own buffer."""
    sharding = jax.sharding.NamedSharding(mesh8, jax.sharding.PartitionSpec("x"))
    array = jax.jit(lambda: jnp.ones((8, 16)), out_shardings=sharding)()
    state = {"w": array, "n": np.ones(3), "step": 1}
    assert trees.stored_nbytes(state) == 8 * 16 * 4 + 3 * 8 + 8
    assert trees.resident_nbytes(state) == 2 * 8 * 16 * 4 + 3 * 8 + 8


def test_own_states_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module:function and a checkpoint make workloads; a name without a function is refused."""
    (tmp_path / "mine.py").write_text("def state():\n    return {'x': 1}\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert workloads.by_function("mine:state").make(1.0) == {"x": 1}
    for wrong in ("mine", "mine:nothing"):
        with pytest.raises(ValueError, match="no module:function"):
            workloads.by_function(wrong)
    ocp.save(tmp_path / "saved", {"w": jnp.arange(3.0), "step": 4})
    found = workloads.by_checkpoint(str(tmp_path / "saved"))
    assert found.name == "saved"
    assert trees.same_values(found.make(1.0), {"w": jnp.arange(3.0), "step": 4})


# -------------------------------------------------------------------------------- measuring


def test_every_figure_is_taken(tmp_path: Path) -> None:
    """One round of each kind of turn gives each figure of ours, and none is left behind."""
    plan = rounds.Plan(directory=tmp_path, rounds=ONCE, is_cold=True, pace_secs=0.02)
    taking_part = [PEERS["ours"], PEERS["raw-1"]]
    record = rounds.measure("small", tiny("leaves-2000"), taking_part, plan)
    assert json.loads(json.dumps(record)) == record
    assert {name: about["left_out"] for name, about in record["peers"].items()} == {
        "ours": "",
        "raw-1": "",
    }
    wanted = {measure for measure, _ in report.COSTS.values()} | set(report.TIMES)
    wanted |= {f"{name}_{pace}" for name in ("step", "counter") for pace in report.PACES.values()}
    for name in ("ours", "raw-1"):
        found = {key for turn in record["turns"] if turn["peer"] == name for key in turn["figures"]}
        assert wanted <= found
    assert not list(tmp_path.iterdir())
    (figure,) = figures.by_round(record, "raw-1", "disk_nbytes").values()
    assert figure == record["nbytes"]


def test_peers_take_turns(tmp_path: Path) -> None:
    """The order of a round is that of the one before, rotated, after a first turn of each."""
    seen = []

    def spy(name: str) -> Peer:
        def save(path: Path, *_: Any) -> Done:
            seen.append(name)
            path.mkdir()
            return Done()

        return replace(PEERS["raw-1"], name=name, save=save, load=lambda *_: 0)

    always = [replace(spy(name), matches=lambda *_: True) for name in "abc"]
    plan = rounds.Plan(directory=tmp_path, rounds={"timed": 4})
    record = rounds.measure("none", {"x": 1}, always, plan)
    assert "".join(seen) == "abc" + "abcbcacababc"
    assert [turn["kind"] for turn in record["turns"]] == ["first"] * 3 + ["timed"] * 12


def test_who_cannot_take_part_is_listed_with_the_reason(tmp_path: Path) -> None:
    """A peer that isn't installed, fails at once or fails later is named, and never dropped."""
    calls = []

    def fail(*_: Any) -> Done:
        raise TypeError("no bfloat16 here\nand more")

    def fail_later(path: Path, state: Any, settings: Any) -> Any:
        calls.append(path)
        return fail() if len(calls) > 2 else PEERS["raw-1"].save(path, state, settings)

    absent = replace(PEERS["dcp"], module="no_such_library.inside", package="no-such-library")
    refuses = replace(PEERS["raw-1"], name="refuses", save=fail)
    breaks = replace(PEERS["raw-1"], name="breaks", save=fail_later)
    told: list[str] = []
    plan = rounds.Plan(directory=tmp_path, rounds={"timed": 3})
    taking_part = [absent, refuses, breaks, PEERS["raw-1"]]
    record = rounds.measure("x", {"x": np.ones(3)}, taking_part, plan, tell=told.append)
    assert {name: about["left_out"] for name, about in record["peers"].items()} == {
        "dcp": "not installed",
        "refuses": "TypeError: no bfloat16 here",
        "breaks": "TypeError: no bfloat16 here",
        "raw-1": "",
    }
    assert len(figures.by_round(record, "breaks", "loaded")) == 1
    assert len(figures.by_round(record, "raw-1", "loaded")) == 3
    assert sum("left out" in line for line in told) == 2
    text = report.tables(record)
    assert "| dcp | not installed |" in text
    assert "| refuses | TypeError: no bfloat16 here |" in text


def test_memory_and_threads_are_seen() -> None:
    """The peak holds what was allocated and freed inside the block; a thread counts once."""
    with measures.PeakMemory() as peak, measures.Threads() as threads:
        block = np.ones(32 << 20, np.uint8)
        del block
        over = threading.Event()
        worker = threading.Thread(target=over.wait)
        worker.start()
    over.set()
    worker.join()
    assert 24 << 20 <= peak.extra <= 48 << 20
    assert threads.count == 1


def test_a_blocked_loop_shows(tmp_path: Path) -> None:
    """The gap covers a save that blocks its caller."""

    def save(path: Path, *_: Any) -> Done:
        path.mkdir()
        time.sleep(0.05)
        return Done()

    one = trial(replace(PEERS["raw-1"], save=save), tmp_path, {"x": 1})
    assert measures.gap(one)["loop_gap"] >= 0.05


# ------------------------------------------------------------------------------- arithmetic


def test_medians_and_ratios() -> None:
    """Quartiles are those of the values; ratios pair the turns of one round."""
    record = record_of(
        {
            "ours": {"committed": [1.0, 2.0, 4.0], "loaded": [1.0]},
            "orbax": {"committed": [10.0, 40.0, 20.0]},
            "raw-1": {"committed": [2.0, 2.0, 2.0]},
            "raw-2": {"committed": [0.5, 1.0, 1.0]},
        },
        floors=("raw-1", "raw-2"),
    )
    assert figures.of(record, "ours", "committed") == Spread(1.5, 2.0, 3.0)
    assert figures.of(record, "ours", "blocked") is None
    assert figures.ratios(record, "committed", "orbax", "ours") == [10.0, 20.0, 5.0]
    assert figures.ratio(record, "committed", "orbax", "ours") == Spread(7.5, 10.0, 15.0)
    assert figures.ratio(record, "loaded", "orbax", "ours") is None
    assert figures.floors(record) == ["raw-1", "raw-2"]
    assert figures.geometric_mean([2.0, 8.0]) == pytest.approx(4.0)
    assert figures.slope([10, 100, 1000], [3, 30, 300]) == pytest.approx(1.0)
    assert figures.slope([10, 100], [1, 100]) == pytest.approx(2.0)


def test_tables_say_what_was_measured(tmp_path: Path) -> None:
    """A table has each peer's time, how durable it is, its ratio to Orbax and to the floor."""
    times = {"blocked": [0.01], "committed": [0.5], "loaded": [2.0]}
    slow = {time: [10 * values[0]] for time, values in times.items()}
    half = {time: [values[0] / 2] for time, values in times.items()}
    record = record_of({"ours": times, "orbax": slow, "raw-1": half}, floors=("raw-1",))
    text = report.tables(record)
    assert "| ours | all | 10 ms | 500 ms | 2 s |" in text
    ours = "10 (10 to 10) | " * 3 + "0.5 (0.5 to 0.5) | 0.5 (0.5 to 0.5)"
    assert f"| ours | {ours} |" in text
    report.write_json(record, tmp_path / "results" / "run-made-up.json")
    assert report.write_runs(tmp_path / "results") == text + "\n"
    assert (tmp_path / "results" / "tables.md").read_text() == text + "\n"
    assert (tmp_path / "results" / "run-made-up.png").read_bytes().startswith(PNG)


# ---------------------------------------------------------------------------------- tuning


def test_only_a_clear_gain_is_recommended() -> None:
    """The fastest variant wins if it is faster in three rounds of four; else the default stays."""

    def best(**committed: list[float]) -> str:
        record = record_of({name: {"committed": values} for name, values in committed.items()})
        return tuning.choose(record, "save", None, ())

    assert best(default=[1.0] * 4, a=[0.5] * 4, b=[0.8] * 4) == "a"
    assert best(default=[1.0] * 4, a=[0.5, 0.9, 1.1, 1.2]) == "default"
    assert best(default=[1.0] * 4, a=[0.99] * 4) == "default"


def test_a_limit_of_memory_comes_before_speed() -> None:
    """What exceeds the limit is not recommended, not even the default."""
    record = record_of(
        {
            "default": {"committed": [1.0], "peak_save": [900.0]},
            "small": {"committed": [3.0], "peak_save": [90.0]},
            "medium": {"committed": [2.0], "peak_save": [300.0]},
        }
    )
    assert tuning.choose(record, "save", None, ("peak_save",)) == "default"
    assert tuning.choose(record, "save", 400, ("peak_save",)) == "medium"
    assert tuning.choose(record, "save", 100, ("peak_save",)) == "small"
    assert tuning.choose(record, "save", 10, ("peak_save",)) == "small"


def test_the_recommended_code_runs() -> None:
    """The lines to paste make the context that was measured."""
    settings = {
        "memory.write_concurrent_bytes": 256 << 20,
        "array.saving.use_compression": False,
        "array.saving.compression_min_saving": 0.05,
    }
    names: dict[str, Any] = {}
    code = tuning.code(settings)
    exec(code, names)
    assert "256 * 2**20" in code
    assert names["context"].__getstate__().keys() == ocp.Context().__getstate__().keys()
    assert names["context"].memory == peers.configured(ocp, settings).memory
    assert names["context"].array == peers.configured(ocp, settings).array


def test_every_factor_is_an_option() -> None:
    """What is swept exists, by path and by value, and none of it is the default."""
    for path, values in tuning.FACTORS.items():
        for value in values:
            context = peers.configured(ocp, {path: value})
            *groups, name = path.split(".")
            group, default = context, ocp.Context()
            for each in groups:
                group, default = getattr(group, each), getattr(default, each)
            assert getattr(group, name) == value != getattr(default, name)


def test_tuning_a_small_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep ends with a table of each factor, a plot, and code that runs."""
    chosen = ("array.saving.use_compression", "memory.write_concurrent_bytes")
    factors = {path: tuning.FACTORS[path][:1] for path in chosen}
    # A value that a load refuses is listed.
    factors["array.loading.use_load_and_broadcast"] = (True,)
    monkeypatch.setattr(tuning, "FACTORS", factors)
    plan = rounds.Plan(directory=tmp_path / "d", rounds={"timed": 2, "memory": 1})
    plan.directory.mkdir()
    told: list[str] = []
    state = tiny("large-f32")
    result = tuning.tune("mine", state, plan, aim="both", limit=None, tell=told.append)
    assert result["recommended"].keys() <= set(chosen)
    assert "ShardingMismatchError" in told[2]
    text = tuning.summary(result)
    assert all(f"## {path}" in text for path in factors)
    exec(text.split("```python\n")[1].split("```")[0], {})
    tuning.draw(json.loads(json.dumps(result)), tmp_path / "tune.png")
    assert (tmp_path / "tune.png").read_bytes().startswith(PNG)


# ------------------------------------------------------------- scale, budgets, growth, GPU


def test_scaling_leaves_a_slow_peer_out(tmp_path: Path) -> None:
    """Ours is measured at each size, Orbax until it takes too long; the table has the ratio."""
    plan = rounds.Plan(directory=tmp_path / "d", rounds={"timed": 1})
    plan.directory.mkdir()
    sizes = {"leaves": [10, 100], "mebibytes": [1]}
    result = scaling.scale(plan, sizes, orbax_secs=0, tell=lambda _: None)
    assert [(record["axis"], record["size"]) for record in result["records"]] == [
        ("leaves", 10),
        ("leaves", 100),
        ("mebibytes", 1),
    ]
    assert ["orbax" in record["peers"] for record in result["records"]] == [True, False, True]
    assert scaling.per_leaf(result, "ours", "committed").keys() == {10, 100}
    text = scaling.summary(result)
    assert "| ours, committed | " in text
    assert "| orbax, committed | " not in text
    scaling.draw(json.loads(json.dumps(result)), tmp_path / "scale.png")
    assert (tmp_path / "scale.png").read_bytes().startswith(PNG)


def test_budgets_are_swept(tmp_path: Path) -> None:
    """Each budget, kind and shape of state has a row, and what is over the bound is marked."""
    budget = 1 << 20
    result = footprint.sweep(tmp_path, [budget], least=2 << 20, tell=lambda _: None)
    assert len(result["rows"]) == 2 * len(footprint.KINDS) * len(footprint.BOUNDS)
    assert "(over)" not in footprint.sweep_summary(result)
    result["rows"][0] |= {"peak": 1 << 30, "is_held": False}
    assert "1024 (over)" in footprint.sweep_summary(result)
    footprint.draw_sweep(result, tmp_path / "budgets.png")
    assert (tmp_path / "budgets.png").read_bytes().startswith(PNG)


def test_growth_is_watched(tmp_path: Path) -> None:
    """Resident memory is taken after each save, from the last one of warming up on."""
    result = footprint.growth(tmp_path, "mine", tiny("leaves-2000"), saves=2, warm_up=1)
    assert len(result["levels"]) == 3
    assert result["per_save"] == (result["levels"][-1] - result["levels"][0]) / 2
    assert "2 saves of mine" in footprint.growth_summary(result)
    footprint.draw_growth(result, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").read_bytes().startswith(PNG)


def test_the_gpu_script_runs(tmp_path: Path) -> None:
    """All that it measures works on any device; donated arrays are saved as they were."""
    found = gpu.measure(jax.devices()[0], tmp_path, 2, 1 << 16, rounds=1)
    assert found["survives_donation"] == {"eager": True, "lazy": True}
    assert found["nbytes"] == 2 << 16
    found = json.loads(json.dumps(found))
    text = gpu.summary(found)
    for row in ("pinned", "pageable", "ours, eager", "ours, lazy", "orbax"):
        assert f"| {row} |" in text
    assert "eager safe, lazy safe" in text
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------------- the command line


def test_the_list_names_everything(capsys: pytest.CaptureFixture[str]) -> None:
    """`list` prints each workload and each peer, with what is not installed."""
    assert __main__.main(["list"]) == 0
    printed = capsys.readouterr().out
    for name in [*workloads.WORKLOADS, *PEERS]:
        assert f"  {name} " in printed
    assert printed.count("not installed") == len(PEERS) - len(INSTALLED)


def test_runs_write_tables_plots_and_records(tmp_path: Path) -> None:
    """`run` measures each workload in a process of its own; `report` writes the same again."""
    out = tmp_path / "results"
    command = [sys.executable, "-m", "benchmarks"]
    options = ["--workload=leaves-2000,sharded", "--scale=0.001", "--rounds=1", "--extra-rounds=0"]
    where = ["--peers=ours,raw-1", f"--out={out}", f"--directory={tmp_path / 'storage'}"]
    done = subprocess.run(
        [*command, "run", *options, *where], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    records = {path.name: json.loads(path.read_text()) for path in sorted(out.glob("*.json"))}
    assert list(records) == ["run-leaves-2000.json", "run-sharded.json"]
    for record in records.values():
        assert not any(about["left_out"] for about in record["peers"].values())
        assert len(record["turns"]) == 4
    assert not list((tmp_path / "storage").iterdir())
    text = (out / "tables.md").read_text()
    assert "8 rounds" not in text and "1 rounds" in text
    (out / "tables.md").unlink()
    assert __main__.main(["report", f"--out={out}"]) == 0
    assert (out / "tables.md").read_text() == text


@pytest.mark.parametrize(
    ("command", "writes"),
    [
        (["growth", "--saves=1"], "growth-grown-make"),
        (["budgets", "--most-mebibytes=0"], "budgets"),
        (["scale", "--most-leaves=100", "--most-mebibytes=1", "--rounds=1"], "scale"),
    ],
)
def test_commands_write_their_results(
    command: list[str],
    writes: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A command prints its text, and writes it beside the record and the plot."""
    (tmp_path / "grown.py").write_text("def make():\n    return {'x': 1}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])
    own = ["--state=grown:make"] if command[0] == "growth" else []
    where = [f"--out={tmp_path / 'out'}", f"--directory={tmp_path / 'storage'}"]
    assert __main__.main([*command, *own, *where]) == 0
    text = (tmp_path / "out" / f"{writes}.md").read_text()
    assert text in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / f"{writes}.json").read_text())
    assert (tmp_path / "out" / f"{writes}.png").read_bytes().startswith(PNG)


def test_calls_files_and_stations_are_counted() -> None:
    """A save's way begins at `save_async` and gets to the loop; each call has a file of ours."""
    code = """
from benchmarks import calls
for name, found in calls.measure().items():
    calls.tell(name, found, calls._function, 3)
    for each in found:
        assert 10 < len(each.files) < len(each.calls) and each.stations and each.begun()
        assert all((calls.PACKAGE / file).is_file() for file in each.files)
"""
    done = subprocess.run(processes.python(code), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "a save: " in done.stdout and "a load: " in done.stdout
    assert "save_async to the loop: " in done.stdout


def test_another_checkout_has_the_harness_of_this_one(tmp_path: Path) -> None:
    """What runs with another package has that one's, and our harness; no package is refused."""
    with pytest.raises(SystemExit, match="is no checkout"):
        processes.python("", tmp_path)
    for name in ("orbax_async", "benchmarks"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("")
    code = "import benchmarks; print(orbax_async.__file__, benchmarks.__file__)"
    found = subprocess.run(processes.python(code, tmp_path), capture_output=True, text=True)
    package, harness = found.stdout.split()
    assert Path(package).is_relative_to(tmp_path)
    assert Path(harness).is_relative_to(ROOT)


def test_checkouts_are_compared_in_pairs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each pair has a turn of both, whose ratio is shown; nothing that was saved is left."""
    storage, out = tmp_path / "storage", tmp_path / "out"
    options = ["--workload=leaves-2000", "--scale=0.001", "--pairs=3", f"--directory={storage}"]
    assert __main__.main(["against", str(ROOT), *options, f"--out={out}"]) == 0
    (record,) = json.loads((out / "against.json").read_text())["records"]
    for time_of in report.TIMES:
        assert len(figures.ratios(record, time_of, "new", "old")) == 3
    assert "| leaves-2000 | committed | " in capsys.readouterr().out
    assert not list(storage.iterdir())


def test_without_a_gpu_the_gpu_command_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It ends with 2, and writes nothing."""
    monkeypatch.setattr(gpu, "device", lambda: None)
    assert __main__.main(["gpu", f"--out={tmp_path / 'out'}"]) == 2
    assert "no GPU" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["--workload=gpt3", "--peers=pickle"])
def test_an_unknown_name_is_refused(option: str, tmp_path: Path) -> None:
    """A misspelt workload or peer ends the command with the names that there are."""
    with pytest.raises(SystemExit, match=r"there is no (workload|peer) .*; there are"):
        __main__.main(["run", option, f"--out={tmp_path}"])


def test_a_run_without_ours_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When our own save fails, the table is written, and the exit status says so."""

    def fail(*_: Any) -> Any:
        raise OSError("disk on fire")

    monkeypatch.setitem(commands.PEERS, "ours", replace(PEERS["ours"], save=fail))
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])
    options = ["--workload=leaves-2000", "--scale=0.001", "--rounds=1", "--extra-rounds=0"]
    where = ["--peers=ours,raw-1", f"--out={tmp_path / 'out'}", f"--directory={tmp_path / 'd'}"]
    assert __main__.main(["run", *options, *where]) == 1
    assert "| ours | OSError: disk on fire |" in (tmp_path / "out" / "tables.md").read_text()
