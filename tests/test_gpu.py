"""tools/gpu: that parts that fail, hang or die cost no other, and that it runs on a processor."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tools.on_gpu import __main__ as on_gpu
from tools.on_gpu import journal, kinds, runner
from tools.on_gpu.part import Place

ROOT = Path(__file__).parents[1]

# A part without torch: CASES are Python, and BROKEN is what it takes CUDA to be.
PART = """
import os, signal, sys, time
from pathlib import Path
from tools.on_gpu.journal import Journal, NotHereError, WrongResultError

def raises(error):
    raise error

book = Journal(Path(sys.argv[-1]))
rest = book.run(CASES, lambda ended: f"{len(ended)} ended", lambda: BROKEN)
sys.exit(75 if rest else 0)
"""


def part(name: str, seconds: float = 20.0, broken: bool = False, **cases: str):
    functions = ", ".join(f"{case!r}: lambda: {does}" for case, does in cases.items())
    text = PART.replace("CASES", "{" + functions + "}").replace("BROKEN", str(broken))
    return runner.Part(name, [sys.executable, "-c", text], seconds, {"PYTHONPATH": str(ROOT)})


def ran(tmp_path: Path, *parts, seconds: float = 60.0):
    """Whether all passed, and the parts of results.json by name."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    passed = runner.run(list(parts), seconds, tmp_path, {"device": "cpu"}, scratch)
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["device"] == "cpu"
    return passed, {result["name"]: result for result in written["parts"]}


def outcomes(result: dict) -> dict[str, str]:
    return {case["name"]: case["outcome"] for case in result["cases"]}


def test_a_part_that_passes(tmp_path, capsys):
    passed, found = ran(tmp_path, part("good", a="{'x': 1}", b="raises(NotHereError('no GPU'))"))
    assert passed
    assert outcomes(found["good"]) == {"a": "passed", "b": "skipped"}
    assert [case["values"] for case in found["good"]["cases"]] == [{"x": 1}, {}]
    assert found["good"]["cases"][1]["why"] == "no GPU"
    printed = capsys.readouterr().out
    assert printed.split() == "good passed 0 s 1 skipped; 2 ended".split()  # noqa: SIM905
    assert (tmp_path / "summary.txt").read_text() == printed
    assert not (tmp_path / "failures.txt").exists()


def test_a_case_that_fails_stops_neither_its_part_nor_the_next(tmp_path, capsys):
    bad = part("bad", a="1 / 0", b="raises(WrongResultError('off', {'by': 2}))", c="{}")
    passed, found = ran(tmp_path, bad, part("good", a="{}"))
    assert not passed
    assert outcomes(found["bad"]) == {"a": "failed", "b": "failed", "c": "passed"}
    first, second, _ = found["bad"]["cases"]
    assert first["why"].endswith("ZeroDivisionError: division by zero")
    assert (second["why"], second["values"]) == ("off", {"by": 2})
    assert found["good"]["outcome"] == "passed"
    assert "2 failed (a)" in capsys.readouterr().out
    assert "ZeroDivisionError" in (tmp_path / "failures.txt").read_text()


def test_a_part_that_hangs_is_killed_with_all_that_it_started(tmp_path):
    file = tmp_path / "late"
    late = f"os.system('sleep 3; touch {file}')"
    passed, found = ran(tmp_path, part("slow", 1.0, a="{}", b=late, c="{}"), part("good", a="{}"))
    assert not passed
    assert found["slow"]["outcome"] == "at limit"
    assert outcomes(found["slow"]) == {"a": "passed", "b": "failed"}
    assert found["slow"]["not_run"] == ["c"]
    assert found["slow"]["seconds"] == pytest.approx(1, abs=0.9)
    assert found["good"]["outcome"] == "passed"
    assert not file.exists()


def test_a_case_that_kills_its_process_leaves_the_others_to_the_next_one(tmp_path):
    dies = part("dies", a="{}", b="os.kill(os.getpid(), signal.SIGSEGV)", c="{'x': 1}")
    passed, found = ran(tmp_path, dies)
    assert not passed
    assert outcomes(found["dies"]) == {"a": "passed", "c": "passed", "b": "failed"}
    assert found["dies"]["cases"][-1]["why"] == "its process died of SIGSEGV"
    assert not found["dies"]["not_run"]


def test_behind_an_error_that_leaves_cuda_broken_another_process_goes_on(tmp_path):
    passed, found = ran(tmp_path, part("cuda", broken=True, a="1 / 0", b="1 / 0", c="{}"))
    assert not passed
    assert outcomes(found["cuda"]) == {"a": "failed", "b": "failed", "c": "passed"}


def test_a_part_that_does_not_begin_is_not_tried_again(tmp_path):
    passed, found = ran(tmp_path, part("none", a="nothing of that name", b="{}"))
    assert not passed
    assert found["none"]["outcome"] == "failed"
    assert "SyntaxError" in found["none"]["line"]


def test_what_does_not_begin_in_time_is_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "_LEAST_SECONDS", 0.5)
    parts = [part("first", 30, a="time.sleep(20)"), part("second", a="{}")]
    passed, found = ran(tmp_path, *parts, seconds=0.8)
    assert not passed
    assert [found[name]["outcome"] for name in ("first", "second")] == ["at limit", "not run"]


def test_lines_fit_the_terminal(tmp_path):
    result = runner.Result("exactness", "failed", 12.0, line="x" * 200, not_run=["a"])
    result.cases = [journal.Ended("worst", "failed", 1.0)]
    shown = result.shown()
    assert len(shown) == runner.WIDTH
    assert "1 failed (worst)" in shown


def test_a_refusal_of_the_command_line_is_told_with_its_reason(tmp_path):
    def refused():
        try:
            raise ValueError("model.beta is -1")
        except ValueError:
            sys.exit(2)

    book = journal.Journal(tmp_path / "book")
    book.run({"a": refused}, lambda ended: "", lambda: False)
    assert book.ended[0].why.endswith("ValueError: model.beta is -1")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--parts", "speed,nothing"], "'nothing' is none of versions"),
        (["--minutes", "0"], "--minutes"),
        (["--minutes", "nan"], "--minutes"),
        (["--device", "cpu"], "--tiny"),
        pytest.param(
            [],
            "no GPU here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
)
def test_settings_that_do_not_work(tmp_path, args, message, capsys):
    with pytest.raises(SystemExit) as stop:
        on_gpu.main(["--output", str(tmp_path), *args])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_128x256>", "matmul"),
        ("nvjet_tst_192x192_64x4_2x1_v_bz_coopA_TNT", "matmul"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<>", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention)", "attention"),
        ("triton_tem_fused_flex_attention_backward_3", "attention"),
        ("void at::native::(anonymous namespace)::cunn_SoftMaxForward<4, float>", "softmax"),
        ("triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_1", "norm"),
        ("triton_poi_fused__to_copy_mul_silu_7", "element-wise, compiled"),
        ("void at::native::indexSelectLargeIndex<c10::BFloat16, long, 2>", "copies"),
        ("Memcpy DtoH (Device -> Pinned)", "copies"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimiser"),
        ("void at::native::vectorized_elementwise_kernel<4, MulFunctor<float>>", "element-wise"),
        ("ncclDevKernel_AllReduce_Sum_f32_RING_LL", "nccl"),
        ("something else", "other"),
    ],
)
def test_kinds_of_kernels(kernel, kind):
    assert kinds.kind(kernel) == kind


def test_the_gpu_is_idle_where_no_kernel_runs():
    assert kinds.union([(5, 7), (0, 2), (1, 3), (1.5, 2.5)]) == 5
    assert kinds.union([]) == 0


def test_a_log_prob_that_is_off_fails_its_cell(monkeypatch):
    from tools.on_gpu import exactness

    cell = ("llama", "LoRA", "packed", "segments", "float32", False)
    place = Place("cpu", True, Path())
    exactness.compare(cell, place)
    compute = exactness.compute

    def off(cell, device, inside=None):
        found = compute(cell, device, inside)
        found["log_probs"][3] += 1e-3
        return found

    monkeypatch.setattr(exactness, "compute", off)
    with pytest.raises(journal.WrongResultError, match="log_probs are off"):
        exactness.compare(cell, place)


@pytest.mark.slow
def test_all_of_it_on_a_processor(tmp_path):
    settings = ["--device", "cpu", "--tiny", "--minutes", "30", "--output", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "gpu"), *settings], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads((tmp_path / "results.json").read_text())
    assert [found["name"] for found in written["parts"]] == list(on_gpu.KNOWN)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["results.json", "summary.txt"]
    every = {case["name"]: case for found in written["parts"] for case in found["cases"]}
    skipped = {name: case["why"] for name, case in every.items() if case["outcome"] == "skipped"}
    assert skipped["FSDP1"] == "needs a GPU"
    assert "flex_attention" in skipped
    assert every["resumed: LoRA with dropout"]["values"]["bit_for_bit"]
    speeds = [case["values"] for name, case in every.items() if "2048" in name]
    assert sum("pairs_per_second" in values for values in speeds) == 3
    lines = done.stdout.splitlines()
    assert len(lines) == len(on_gpu.KNOWN)
    assert max(map(len, lines)) <= runner.WIDTH
