"""Reads machine code as nvdisasm prints it: which instructions there are, and how many a warp runs on its way out."""

from __future__ import annotations

import heapq
import re
from collections import defaultdict

_LABEL = re.compile(r"^\s*\.(L_x_\w+):")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?);")
_FAR_JUMP = r"CALL\.REL\.NOINC `\(\.L_x"  # ptxas leaves long loops by a call that never returns
_ENDS_BLOCK = re.compile(rf"(@!?U?P\w+ )?(BRA\b|EXIT\b|RET\b|{_FAR_JUMP})")


class Program:
    """Basic blocks of one kernel and where each may go next."""

    def __init__(self, text: str) -> None:
        self.blocks: list[list[str]] = [[]]
        starts: dict[str, int] = {}
        for line in text.splitlines():
            if label := _LABEL.match(line):
                self.blocks.append([])
                starts[label[1]] = len(self.blocks) - 1
            elif found := _INSTRUCTION.match(line):
                self.blocks[-1].append(found[1].strip())
                if _ENDS_BLOCK.match(self.blocks[-1][-1]):
                    self.blocks.append([])
        self.next = [self._next_of(i, starts) for i in range(len(self.blocks))]

    def _next_of(self, i: int, starts: dict[str, int]) -> list[int]:
        last = self.blocks[i][-1] if self.blocks[i] else ""
        found = (
            [starts[target[0]]]
            if re.search(rf"BRA|{_FAR_JUMP}", last) and (target := re.search(r"L_x_\w+", last))
            else []
        )
        always = not last.startswith("@") and not re.search(r"BRA(\.\w+)* !?U?P", last)
        if not (_ENDS_BLOCK.match(last) and always) and i + 1 < len(self.blocks):
            found.append(i + 1)
        return found

    def count(self, pattern: str) -> int:
        """Instructions whose text matches the pattern from the opcode on."""
        matcher = re.compile(rf"(@!?U?P\w+ )?({pattern})")
        return sum(bool(matcher.match(line)) for block in self.blocks for line in block)

    def epilogue_length(self) -> int:
        """Instructions on the shortest way from the end of the last loop of matrix instructions to the exit.

        That way is the one of a whole tile with nothing unusual in it: whatever else there is lies behind a branch.
        """
        matrix = {i for i, block in enumerate(self.blocks) if any("MMA" in line for line in block)}
        before = self._reaching(matrix)
        queue = []
        for i in matrix:
            for j in self.next[i]:
                if j not in before and j not in matrix:
                    tail = 0 if i in before else self._after_last_matrix(i)
                    queue.append((tail + len(self.blocks[j]), j))
        heapq.heapify(queue)
        done = set()
        while queue:
            length, i = heapq.heappop(queue)
            if any(re.match(r"(@!?U?P\w+ )?EXIT", line) for line in self.blocks[i]):
                return length
            if i not in done:
                done.add(i)
                for j in self.next[i]:
                    heapq.heappush(queue, (length + len(self.blocks[j]), j))
        raise RuntimeError("no way from the matrix instructions to the exit was found in this kernel")

    def _after_last_matrix(self, i: int) -> int:
        block = self.blocks[i]
        return len(block) - 1 - max(k for k, line in enumerate(block) if "MMA" in line)

    def _reaching(self, targets: set[int]) -> set[int]:
        """Blocks from which one of the targets can be reached by at least one step."""
        previous = defaultdict(set)
        for i, following in enumerate(self.next):
            for j in following:
                previous[j].add(i)
        found: set[int] = set()
        waiting = list(targets)
        while waiting:
            for i in previous[waiting.pop()] - found:
                found.add(i)
                waiting.append(i)
        return found
