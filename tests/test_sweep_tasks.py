"""How tasks of a sweep are divided and gathered; a stand-in by hand takes the place of Ray."""

from types import SimpleNamespace

from rich.console import Console

from fedjax_lora.app.sweep_ray import _gather


class RayError(Exception):
    pass


class Failed(RayError):
    """As Ray wraps it."""

    def __init__(self, cause):
        super().__init__("a traceback of\nmany lines")
        self.cause = cause


def gathered(parts, failing):
    """`_gather` of tasks, of which those with a name in `failing` raise its error; and the tasks that were run."""
    ran = []

    def get(task):
        ran.append(task)
        for name in task:
            if isinstance(failing.get(name), Exception):
                raise failing[name]
        return {name: failing[name] for name in task if name in failing}

    ray = SimpleNamespace(
        wait=lambda tasks, num_returns: (tasks[:num_returns], tasks[num_returns:]),
        get=get,
        exceptions=SimpleNamespace(RayError=RayError),
    )
    running = {tuple(part): list(part) for part in parts}
    return _gather(ray, running, tuple, Console(quiet=True)), ran


def test_what_a_task_refuses_is_refused_with_its_reason_by_hand():
    assert gathered([["a", "b"], ["c"]], {"b": "no such file"}) == ({"b": "no such file"}, [("a", "b"), ("c",)])


def test_a_task_that_fails_is_divided_and_stops_no_other_by_hand():
    reasons, ran = gathered([["a", "b"], ["c"]], {"b": Failed(RuntimeError("on\npurpose"))})
    assert reasons == {"b": "failed: RuntimeError: on purpose"}
    assert ran == [("a", "b"), ("c",), ("a",), ("b",)]


def test_a_worker_that_dies_for_good_is_told_by_hand():
    reasons, _ = gathered([["a"], ["c"]], {"a": RayError("the worker died")})
    assert reasons == {"a": "failed: RayError: the worker died"}
