"""What DeepSpeed 0.19.8 does for every parameter in ZeRO stages 1 and 2, and need not do here.

A network has hundreds of parameters, and a GPU may wait for the host that handles them one by one.
"""

from typing import Any


def skip_needless_work(optimizer: Any) -> None:
    """Let `optimizer`, DeepSpeed's for stages 1 and 2, leave out what changes nothing."""
    # After each step it points every parameter at its place in the flat buffer, where it is since the start.
    optimizer._update_model_bit16_weights = lambda group_index: None
    # In each hook it words messages about memory that nobody has asked for.
    optimizer.report_ipg_memory_usage = lambda *arguments, **named: None
