"""Which pages of the key-value cache belong to whom: a table a request, and prefixes that requests share.

The pages themselves lie on the devices; here is only their bookkeeping.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field


class NoRoom(Exception):
    """Fewer pages are left than a request needs now; nothing was taken."""


@dataclass(eq=False)
class _Page:
    """A page: how many requests hold it, and, where its keys are those of known tokens, what it continues."""

    number: int
    holders: int = 0
    before: _Page | None = None
    tokens: tuple[int, ...] = ()
    children: dict[tuple[int, ...], _Page] = field(default_factory=dict)


@dataclass(eq=False)
class Table:
    """A request's pages in order, and how many tokens have a slot in them.

    `shared` of the first tokens had their keys and values there already. Slot i of page j is of the request's
    token j * size + i.
    """

    pages: list[_Page]
    tokens: list[int]
    shared: int
    known: int = 0

    @property
    def numbers(self) -> list[int]:
        """The pages' numbers."""
        return [page.number for page in self.pages]


class Pages:
    """All pages of a cache, numbered from `first`.

    A page is free, held by one or more requests, or kept: held by none, but full of known tokens that a later
    request may begin with. Kept pages are taken anew, the longest unused first, once no page is free.
    """

    def __init__(self, count: int, size: int, first: int = 0) -> None:
        self.count, self.size = count, size
        self._free = [_Page(number) for number in reversed(range(first, first + count))]
        self._roots: dict[tuple[int, ...], _Page] = {}
        # By when they were last held.
        self._kept: OrderedDict[int, _Page] = OrderedDict()

    @property
    def free(self) -> int:
        """Pages that a request can have: those that nothing is in, and the kept ones."""
        return len(self._free) + len(self._kept)

    @property
    def kept(self) -> int:
        """Pages that are kept for what is in them."""
        return len(self._kept)

    @property
    def held(self) -> int:
        """Pages that requests hold; a shared one counts once."""
        return self.count - self.free

    def needed(self, tokens: int) -> int:
        """How many pages so many tokens take."""
        return -(-tokens // self.size)

    def begin(self, tokens: Sequence[int]) -> Table:
        """A table with slots for a prompt; its longest prefix of known whole pages is shared.

        The last token is never among the shared ones: its logits are wanted.

        Raises:
            NoRoom: too few pages are left.
        """
        prefix: list[_Page] = []
        children = self._roots
        for end in range(self.size, len(tokens), self.size):
            page = children.get(tuple(tokens[end - self.size : end]))
            if page is None:
                break
            prefix.append(page)
            children = page.children
        wanted = self.needed(len(tokens)) - len(prefix)
        if wanted > self.free - sum(page.number in self._kept for page in prefix):
            raise NoRoom
        for page in prefix:
            self._hold(page)
        table = Table(prefix, list(tokens), shared=len(prefix) * self.size, known=len(prefix))
        table.pages = prefix + [self._take() for _ in range(wanted)]
        return table

    def add(self, table: Table, token: int) -> None:
        """A slot for one token more.

        Raises:
            NoRoom: it needs a page, and none is left.
        """
        if len(table.tokens) == len(table.pages) * self.size:
            if not self.free:
                raise NoRoom
            table.pages.append(self._take())
        table.tokens.append(token)

    def written(self, table: Table, tokens: int) -> None:
        """So many of a table's first tokens have keys and values now: its whole pages can be shared."""
        assert tokens <= len(table.tokens), (tokens, len(table.tokens))
        while (table.known + 1) * self.size <= tokens:
            page = table.pages[table.known]
            before = table.pages[table.known - 1] if table.known else None
            begin = table.known * self.size
            content = tuple(table.tokens[begin : begin + self.size])
            siblings = self._roots if before is None else before.children
            # Where another request wrote the same beside it, that one's page stays the known one; and behind
            # a page that is not known none is.
            if (before is not None and not before.tokens) or content in siblings:
                table.known = len(table.pages) + 1
                return
            page.before, page.tokens = before, content
            siblings[content] = page
            table.known += 1

    def end(self, table: Table) -> None:
        """Give a table's pages back; known ones are kept, until they are needed."""
        # The last first: what others continue is to go last.
        for page in reversed(table.pages):
            page.holders -= 1
            if page.holders == 0:
                if page.tokens:
                    self._kept[page.number] = page
                else:
                    self._free.append(page)
        table.pages = []

    def _hold(self, page: _Page) -> None:
        if page.holders == 0:
            del self._kept[page.number]
        page.holders += 1

    def _take(self) -> _Page:
        if not self._free:
            self._forget(next(iter(self._kept.values())))
        page = self._free.pop()
        page.holders = 1
        return page

    def _forget(self, page: _Page) -> None:
        """Make a kept page free, and what continues it, which nobody can reach any more."""
        siblings = self._roots if page.before is None else page.before.children
        del siblings[page.tokens]
        stack = [page]
        while stack:
            one = stack.pop()
            stack += one.children.values()
            one.before, one.tokens, one.children = None, (), {}
            if one.holders == 0:
                del self._kept[one.number]
                self._free.append(one)
