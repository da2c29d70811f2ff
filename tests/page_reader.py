"""An engine whose policy searches, opens the page that it found, and answers with the page's last word."""

from __future__ import annotations

import re

from agent.policy import Policy
from agent.protocol import Answer, Protocol
from agent.tools import Call, Search
from tests.scripted import ScriptedEngine


class PageReader(ScriptedEngine):
    """Asked "How does the page about X end?" it does as it should."""

    def __init__(self, policy: Policy, protocol: Protocol, opens: str = "open_page") -> None:
        super().__init__(policy.tokenizer, self.write)
        self.protocol, self.opens = protocol, opens

    def write(self, text: str) -> str:
        """The next turn after this text."""
        [title] = re.findall(r"How does the page about (.+?) end", text)
        tag = f"</{self.protocol.observation_tag}>"
        *seen, _ = text.rsplit("How does the page", 1)[1].split(tag)
        if not seen:
            return self.protocol.render_turn("find", Search(title))
        if len(seen) == 1:
            return self.protocol.render_turn("open", Call(self.opens, "1"))
        return self.protocol.render_turn("read", Answer(seen[-1].rstrip(". \n").split()[-1]))
