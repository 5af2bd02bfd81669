"""``sharded-adadiag plan`` as users call it."""

import json
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from sharded_adadiag.__main__ import main
from sharded_adadiag.planner.mesh import Mesh
from sharded_adadiag.planner.models import named_model
from sharded_adadiag.planner.request import Request, answer

KEYS = (
    "model, ranks, matrices, plan_seconds, peak_rss_mb, rounds, team_sizes, "
    "step_efficiency, work_max_over_mean, refresh_max_over_mean, state_bytes_mean, "
    "state_bytes_max, sent_bytes_step_max, messages_step_max, buffer_bytes_max"
).split(", ")


def planned(capsys, *arguments, model="llama-60m", ranks=4):
    code = main(["plan", model, "--ranks", str(ranks), "--json", *arguments])
    assert code == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys, *arguments):
    try:
        code = main(["plan", *arguments])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert code == 2 and not out
    assert err.startswith("sharded-adadiag plan: ") and err.count("\n") == 1
    return err


def test_json_has_the_promised_keys(capsys):
    figures = planned(capsys)
    assert set(KEYS) <= set(figures)
    assert figures["model"] == "llama-60m" and figures["ranks"] == 4
    assert figures["matrices"] == 56
    assert sum(figures["team_sizes"].values()) == 56
    assert 0 < figures["step_efficiency"] <= 1 <= figures["work_max_over_mean"]
    assert 0 < figures["plan_seconds"] and 50 < figures["peak_rss_mb"]


def test_the_table_fits_a_screen_and_needs_no_process_group(capsys):
    assert main(["plan", "llama-60m", "--ranks", "8", "--distribution", "owner"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 110
    for name in (
        "rotated",
        "teams",
        "rounds",
        "state",
        "traffic",
        "buffers",
        "refresh",
    ):
        assert any(line.startswith(name) for line in lines), name
    assert not dist.is_initialized()


def test_a_table_of_thousands_of_ranks_says_which_were_looked_at(capsys):
    assert main(["plan", "llama-60m", "--ranks", "1000"]) == 0
    assert " of 1,000 ranks" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments,word",
    [
        (["nix", "--ranks", "2"], "nix"),
        (["no/such/config.json", "--ranks", "2"], "no such file"),
        (["llama-60m"], "--ranks"),
        (["llama-60m", "--ranks", "0"], "--ranks"),
        (["llama-60m", "--ranks", "two"], "two"),
        (["llama-60m", "--ranks", "8", "--replicas", "3"], "--replicas 3"),
        (["llama-60m", "--ranks", "8", "--tensor-parallel", "3"], "parallel 3"),
        (["llama-60m", "--ranks", "8", "--ranks-per-node", "3"], "nodes of 3"),
        (["llama-60m", "--ranks", "8", "--layout", "fsdp3"], "fsdp3"),
        (["llama-60m", "--ranks", "8", "--max-rotated-dim", "0"], "max_rotated_dim"),
        (["llama-60m", "--ranks", "8", "--refresh-every", "x"], "--refresh-every"),
        (["llama-60m", "--ranks", "8", "--refresh-every", "0"], "refresh_every"),
        (["llama-60m", "--ranks", "8", "--refresh-slots", "x"], "--refresh-slots"),
        (["llama-60m", "--ranks", "8", "--refresh-slots", "201"], "refresh_slots"),
        (["llama-60m", "--ranks", "8", "--buffer-bytes", "0"], "--buffer-bytes"),
        (["llama-60m", "--ranks", "8", "--no-momentum"], "momentum"),
        (["llama-60m", "--ranks", "2", "--plot", "/no/such/folder/x.png"], "--plot"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, word, capsys):
    assert word in refused(capsys, *arguments)


# Of each option: an argument, and what of the figures must be another for it.
CHANGES = {
    "--layout zero": "sent_bytes_step_max",
    "--layout fsdp1": "sent_bytes_step_max",
    "--layout ddp": "sent_bytes_step_max",
    "--replicas 2": "sent_bytes_step_max",
    "--tensor-parallel 2": "sent_bytes_step_max",
    "--optimizer AdafacDiag": "state_bytes_max",
    "--optimizer HfacDiag": "state_bytes_max",
    "--distribution broadcast": "team_sizes",
    "--sides two": "state_bytes_max",
    "--sides none": "matrices",
    "--side right": "state_bytes_max",
    "--state-dtype bfloat16": "state_bytes_max",
    "--rotation-dtype bfloat16": "state_bytes_max",
    "--max-rotated-dim 100": "matrices",
    "--basis eigh": "refresh_max",
    "--refresh-slots 8": "refresh_max",
    "--refresh-lag 2": "state_bytes_max",
    "--refresh-slots auto": "refresh_slots",
    "--buffer-bytes 2000000": "rounds",
    "--param-dtype bfloat16": "state_bytes_max",
    "--grad-dtype bfloat16": "sent_bytes_step_max",
    "--nonfinite ignore": "collectives_step",
}


@pytest.fixture(scope="module")
def usual():
    done = subprocess.run(
        [sys.executable, "-m", "sharded_adadiag"]
        + ["plan", "llama-60m", "--ranks", "4", "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize("argument", sorted(CHANGES))
def test_an_option_changes_what_it_is_about(argument, usual, capsys):
    key = CHANGES[argument]
    assert planned(capsys, *argument.split())[key] != usual[key]


def test_the_momentum_of_adafacdiag_can_be_left_out(capsys):
    which = ("--optimizer", "AdafacDiag")
    with_it = planned(capsys, *which, "--momentum")
    without = planned(capsys, *which, "--no-momentum")
    assert without["state_bytes_max"] < with_it["state_bytes_max"]


def test_reprojecting_both_sides_is_not_for_broadcast(capsys):
    sides = ("--sides", "two", "--distribution", "broadcast")
    assert planned(capsys, *sides)["routes"] == {"broadcast": 56}
    reprojected = planned(capsys, *sides, "--on-refresh", "reproject")
    assert reprojected["routes"] == {"owner": 56}


def test_a_noise_floor_needs_sums_where_matrices_are_divided(capsys):
    divided = ("--distribution", "broadcast")
    none = planned(capsys, *divided)
    some = planned(capsys, *divided, "--noise-floor", "0.001")
    assert some["collectives_step"] > none["collectives_step"]


def test_the_steps_between_refreshes_are_in_the_table(capsys):
    for steps, word in (("50", "every 50 steps"), ("never", "once")):
        asked = ["plan", "llama-60m", "--ranks", "2", "--refresh-every", steps]
        assert main(asked) == 0
        assert word in capsys.readouterr().out


def test_teams_stay_on_a_node_where_it_has_room():
    def further_nodes(per_node):
        model = named_model("llama-130m")
        plan = answer(Request(model, Mesh(64), ranks_per_node=per_node)).plan
        teams = [matrix.route.team for matrix in plan.matrices]
        return sum(len({rank // 4 for rank in team}) - 1 for team in teams)

    assert further_nodes(4) < further_nodes(None)


def test_a_config_file_is_a_model(tmp_path, capsys):
    file = tmp_path / "config.json"
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 100}
    file.write_text(json.dumps({"model_type": "llama", **sizes}))
    figures = planned(capsys, model=str(file))
    assert figures["matrices"] == 21 and figures["model"] == str(file)


@pytest.mark.slow
def test_bad_figures_are_warned_of_with_the_option_that_mends_them(capsys):
    told = planned(capsys, "--max-rotated-dim", "100")["warnings"]
    assert any("--max-rotated-dim" in line for line in told)
    owners = ("--distribution", "owner", "--buffer-bytes", "1000")
    told = planned(capsys, *owners, ranks=100)["warnings"]
    for remedy in ("--distribution auto", "--buffer-bytes", "--state-dtype"):
        assert any(remedy in line for line in told), remedy
    told = planned(capsys, "--distribution", "broadcast", ranks=32)["warnings"]
    assert any("copies of rotations: --distribution auto" in line for line in told)


def test_no_gpu_is_touched(capsys):
    planned(capsys)
    assert not torch.cuda.is_initialized()


def test_the_loads_of_the_ranks_can_be_drawn(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    file = tmp_path / "loads.png"
    planned(capsys, "--plot", str(file))
    assert file.read_bytes().startswith(b"\x89PNG")


def test_drawing_without_matplotlib_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    asked = ["llama-60m", "--ranks", "2", "--plot", str(tmp_path / "x.png")]
    assert "matplotlib" in refused(capsys, *asked)


def test_there_is_a_console_script():
    project = Path(__file__).parents[2] / "pyproject.toml"
    (script,) = re.findall(r'^sharded-adadiag = "(.*)"$', project.read_text(), re.M)
    assert pkgutil.resolve_name(script) is main


@pytest.mark.parametrize(
    "options",
    [
        ("--sides", "two"),
        ("--optimizer", "HfacDiag"),
        ("--sides", "two", "--noise-floor", "0.1"),
        (),
    ],
    ids=" ".join,
)
def test_what_does_not_travel_in_blocks_is_warned_of_with_what_would(capsys, options):
    tight = ("--distribution", "owner", "--buffer-bytes", "500000")
    told = planned(capsys, *tight, *options)["warnings"]
    over = [line for line in told if "do not travel in blocks" in line]
    assert len(over) == bool(options)
    remedies = {"--sides": "--sides one", "--noise-floor": "--noise-floor 0"}
    remedies["--optimizer"] = "--optimizer AdaDiag"
    assert all(remedies[name] in over[0] for name in options[::2])


def test_more_ranks_than_matrices_wait_for_the_bases(capsys):
    told = planned(capsys, ranks=512)["warnings"]
    assert any("--refresh-every" in line and "56 matrices" in line for line in told)
    assert not any("--refresh-every" in line for line in planned(capsys)["warnings"])
