"""Which flags of the trainer the loop with torch's DDP takes: apart, so that a spec is checked without torch."""

from allreduce_sgd.config import Config, options
from allreduce_sgd.errors import ConfigError

__all__ = ["check_flags"]

_GROUPS = ("data", "model", "optimizer")
_FLAGS = frozenset(
    "batch-size device epochs evaluate-every global-batch-size log-every output seed steps target-accuracy threads "
    "timeout-seconds".split()
)


def check_flags(config: Config) -> None:
    """Raise ConfigError where a flag differs from its default that the loop does not look at."""
    given, defaults = config.flat(), Config().flat()
    known = {*_FLAGS, *(each.name for each in options() if each.group in _GROUPS)}
    for name, value in given.items():
        if name not in known and value != defaults[name]:
            raise ConfigError(f"--{name} {value}: the loop with torch's DDP has no use for it; leave it out")
    if config.optimizer.lr_schedule == "plateau":
        raise ConfigError("--lr-schedule plateau: the loop with torch's DDP does not look at losses; take another")
