import argparse

from benchmarks.common.scenarios import SCENARIOS
from benchmarks.memory import measure as memory


def test_memory_of_a_case_and_its_plan(small):
    case = memory.Case("small", "photo", 1, "float32", False, "exact")
    row = memory.with_plan(memory.measure(small, case, "cpu"))
    assert row["planned"]["cross_kv_error"] == 0
    assert abs(row["planned"]["weights_error"]) < 0.01
    stock = memory.with_plan(
        memory.measure(small, memory.Case("small", "photo", 1, "float32", False, "stock static"), "cpu")
    )
    assert stock["planned"]["cross_kv_error"] == 0
    assert stock["cross_kv"] == 4 * row["cross_kv"]


def test_memory_cases_are_unique_and_cover_what_was_asked():
    arguments = argparse.Namespace(shapes=["small", "11b-layers"], quick=False, batches=[2])
    cases = memory.cases(arguments)
    assert len(cases) == len(set(cases))
    assert {case.weights for case in cases} == {"float32", "bfloat16", "int8", "nf4"}
    assert {case.scenario for case in cases} == set(SCENARIOS)
