"""`rlhf-fast chat`: talk to a model.

conversation.py   what was said, and the model's next reply
terminal.py       lines in, text out, commands, colours, Ctrl-C
"""

from .conversation import Conversation
from .terminal import chat

__all__ = ["Conversation", "chat"]
