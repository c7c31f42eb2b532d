import pytest

from allreduce_sgd.errors import ConfigError
from allreduce_sgd.user_code import call_with_named, describe, load_function, refusing


def test_only_what_is_named_is_passed() -> None:
    available = {"a": 1, "b": 2}
    assert call_with_named(lambda: 0, available, "it") == 0
    assert call_with_named(lambda b: b, available, "it") == 2
    assert call_with_named(lambda b, c=5, *rest, a, **others: (a, b, c, rest, others), available, "it") == (
        1,
        2,
        5,
        (),
        {},
    )


def test_an_argument_that_cannot_be_named() -> None:
    with pytest.raises(ConfigError, match="it: the function requires a, c; it may name only a, b"):
        call_with_named(eval("lambda a, /, b, c: 0"), {"a": 1, "b": 2}, "it")


def test_descriptions_are_short_and_of_one_line() -> None:
    assert describe(ValueError("a\n  b")) == "ValueError: a b"
    assert describe(KeyError()) == "KeyError"
    assert len(describe(ValueError("x" * 10_000))) < 400


def test_refusing_passes_config_errors_and_interrupts() -> None:
    with pytest.raises(ConfigError, match=r"^mine$"), refusing("it"):
        raise ConfigError("mine")
    with pytest.raises(KeyboardInterrupt), refusing("it"):
        raise KeyboardInterrupt


def test_installed_modules_are_found_too() -> None:
    assert load_function("os.path:join", "--flag")("a", "b") == "a/b"
