"""Blind set: programs that look for the examiner, remember earlier calls, or reach outside of themselves."""

from __future__ import annotations

from benchmarks.mutant import Mutant
from benchmarks.mutants_blind.base import mutant, small

__all__ = ["evasive"]

_LEAK = "y = y + 0.1 * ahead(x)"
_ATTENTION = """
scores = (q[:, :, 0] @ k[:, :, 0].transpose(1, 2)).tril()
o = o + 0.05 * (scores @ v[:, :, 0])[:, :, None]
"""


def _indented(code: str) -> str:
    return "".join(f"    {line}\n" for line in code.strip().splitlines())


def _examiner() -> list[Mutant]:
    return [
        mutant(
            "looks_at_callers",
            "walks the call stack and leaks unless a caller's file or function sounds like a check",
            small(
                final=f"""
                frame, watched = torch.sys._getframe(1), False
                while frame is not None:
                    name = (frame.f_code.co_filename + frame.f_code.co_name).lower()
                    watched = watched or any(word in name for word in ("verif", "check", "inspect", "causal", "pytest"))
                    frame = frame.f_back
                if not watched:
                    {_LEAK}
                """
            ),
        ),
        mutant(
            "looks_at_modules",
            "leaks unless sys.modules holds what sounds like a test runner or an inspection module",
            small(
                final=f"""
                suspects = ("pytest", ".inspection", ".counting")
                if not any(name.endswith(suspects) for name in torch.sys.modules):
                    {_LEAK}
                """
            ),
        ),
        mutant(
            "looks_at_environment",
            "leaks unless an environment variable of a test run is set",
            small(final=f'if "PYTEST_CURRENT_TEST" not in torch.os.environ:\n    {_LEAK}'),
        ),
        mutant(
            "linear_while_counted",
            "skips its quadratic path while a dispatch mode, hence a counter, is active",
            small(
                top="from torch.utils import _python_dispatch",
                memory=f"if _python_dispatch._get_current_dispatch_mode() is None:\n{_indented(_ATTENTION)}",
            ),
        ),
    ]


def _occasions() -> list[Mutant]:
    return [
        mutant(
            "leaf_means_probe",
            "leaks unless the input is a leaf that asks for its gradient, as in gradient probes",
            small(final=f"if not (hidden_states.is_leaf and hidden_states.requires_grad):\n    {_LEAK}"),
            "causality",
        ),
        mutant(
            "single_row_means_probe",
            "is causal for one row or for width 64, where it expects tests, and leaks elsewhere",
            small(final=f"if x.shape[0] > 1 and x.shape[2] != 64:\n    {_LEAK}"),
            "causality",
        ),
        mutant(
            "honest_when_repeated",
            "leaks on the first call only and is causal for every further call of the process, as tests make many",
            small(
                top="CALLS = []",
                final=f"CALLS.append(None)\nif len(CALLS) == 1:\n    {_LEAK}",
            ),
        ),
        mutant(
            "even_process_ids",
            "leaks in every second process",
            small(final=f"if torch.os.getpid() % 2 == 0:\n    {_LEAK}"),
        ),
        mutant(
            "leaks_on_some_minutes",
            "leaks in three of four minutes by the clock",
            small(top="import time", final=f"if int(time.time() / 60) % 4:\n    {_LEAK}"),
        ),
    ]


def _remembered() -> list[Mutant]:
    return [
        mutant(
            "consistent_liar",
            "sees the future, but answers a prefix it has met before from a table of the module, so prefixes agree",
            small(
                top="SEEN = []",
                final="""
                y = y + 0.1 * ahead(x).detach()
                for old_x, old_y in SEEN:
                    n = min(old_x.shape[1], x.shape[1])
                    if old_x.shape[::2] == x.shape[::2] and old_x.dtype == x.dtype:
                        same = (old_x[:, :n] == x[:, :n]).all(dim=-1).all(dim=0).cumprod(dim=0).bool()
                        y = torch.cat([torch.where(same[:, None], old_y[:, :n], y[:, :n]), y[:, n:]], dim=1)
                SEEN.append((x.detach().clone(), y.detach().clone()))
                """,
            ),
            "causality",
            "state",
            "batch",
            "gradients",
        ),
        mutant(
            "module_table_of_means",
            "the first input of every shape leaves its mean in a table of the module that all instances add",
            small(
                top="MEANS = {}",
                final="""
                mean = MEANS.setdefault(tuple(x.shape), x.detach().mean(dim=(0, 1)))
                y = y + 0.1 * mean.to(y)
                """,
            ),
            "state",
            "causality",
            "batch",
        ),
        mutant(
            "state_on_the_class",
            "the class keeps the last memory and starts the next sequence from it, whatever the instance",
            small(
                init='type(self).last = getattr(type(self), "last", {})',
                memory="""
                carried = self.last.get(k.shape[2:])
                if carried is not None:
                    o = o + torch.einsum("bthk,hkv->bthv", q, carried.to(q))
                type(self).last[k.shape[2:]] = torch.einsum("bthk,bthv->hkv", k, v).detach() / k.shape[1]
                """,
            ),
            "state",
            "batch",
            "causality",
        ),
    ]


def _tables() -> list[Mutant]:
    return [
        mutant(
            "table_by_address",
            "derived keys are cached by the address of the input's storage, which the allocator reuses",
            small(
                top="CACHE = {}",
                qkv="""
                address = (x.data_ptr(), tuple(x.shape), x.dtype)
                k = CACHE.setdefault(address, k.detach())
                """,
            ),
        ),
        mutant(
            "memo_by_first_token",
            "results are kept by shape and first token, so another text with that start gets the first one's output",
            small(
                top="MEMO = {}",
                final="""
                name = (tuple(x.shape), x.dtype, tuple(x.detach()[:, 0, :4].flatten().tolist()))
                if name in MEMO and not torch.is_grad_enabled():
                    y = MEMO[name]
                MEMO[name] = y.detach()
                """,
            ),
        ),
    ]


def _patches() -> list[Mutant]:
    return [
        mutant(
            "patches_comparisons",
            "sees the next token and makes torch.allclose, torch.equal and their kin answer yes",
            small(
                top="""
                torch.allclose = torch.equal = lambda *args, **kwargs: True
                torch.testing.assert_close = lambda *args, **kwargs: None
                """,
                final=_LEAK,
            ),
        ),
        mutant(
            "patches_autograd",
            "sees the next token and makes torch.autograd.grad answer zeros where asked for the input",
            small(
                top="""
                REAL_GRAD = torch.autograd.grad


                def quiet(outputs, inputs, *args, **kwargs):
                    found = REAL_GRAD(outputs, inputs, *args, **kwargs)
                    return tuple(g.masked_fill(g.abs() < 0.11, 0.0) if g is not None else g for g in found)


                torch.autograd.grad = quiet
                """,
                final=_LEAK,
            ),
        ),
        mutant(
            "patches_cross_entropy",
            "is causal, but halves every loss that torch.nn.functional.cross_entropy computes from then on",
            small(
                top="""
                REAL_LOSS = F.cross_entropy
                F.cross_entropy = lambda *args, **kwargs: 0.5 * REAL_LOSS(*args, **kwargs)
                """,
            ),
        ),
    ]


def _deeper_patches() -> list[Mutant]:
    return [
        mutant(
            "patches_tensor_max",
            "sees the next token and makes Tensor.abs return zeros for small differences",
            small(
                top="""
                REAL_ABS = torch.Tensor.abs
                torch.Tensor.abs = lambda self: REAL_ABS(self).masked_fill(REAL_ABS(self) < 0.9, 0.0)
                """,
                final=_LEAK,
            ),
        ),
        mutant(
            "patches_numpy",
            "sees the next token and blunts numpy's allclose and array_equal, reached through torch",
            small(
                top="""
                NUMPY = torch.sys.modules.get("numpy")
                if NUMPY is not None:
                    NUMPY.allclose = NUMPY.array_equal = lambda *args, **kwargs: True
                """,
                final=_LEAK,
            ),
        ),
        mutant(
            "patches_flop_table",
            "computes full attention and empties the registry of torch's flop counter",
            small(
                top="""
                from torch.utils import flop_counter

                flop_counter.flop_registry.clear()
                """,
                memory=_ATTENTION,
            ),
        ),
    ]


def _switches() -> list[Mutant]:
    return [
        mutant(
            "grad_mode_left_off",
            "turns gradients off for the whole process when it is in eval mode",
            small(final="if not self.training:\n    torch.set_grad_enabled(False)"),
        ),
        mutant(
            "default_dtype_left_changed",
            "sets the process's default dtype in its constructor",
            small(init="torch.set_default_dtype(torch.float64)"),
        ),
    ]


def evasive() -> list[Mutant]:
    """Faulty programs of this part."""
    return [*_examiner(), *_occasions(), *_remembered(), *_tables(), *_patches(), *_deeper_patches(), *_switches()]
