"""Budgets of tokens and money that hold, whatever is in flight.

A request is let through only if everything spent, everything in flight at its most, and its own most fit together.
So a budget is never exceeded, but for what a server bills beyond the tokens it was allowed to write.
"""

import asyncio

from selfdev.errors import SelfdevError
from selfdev.factory.journal import Answer, Journal, Usage
from selfdev.settings import Endpoint


class Exhausted(SelfdevError):
    """The next request does not fit a budget, and nothing is in flight that might leave it room."""


class Budget:
    """The budgets of one run, while one event loop asks.

    Args:
        settings: budgets and prices.
        journal: keeps the account, in this session and those before.
    """

    def __init__(self, settings: Endpoint, journal: Journal):
        self.settings = settings
        self.journal = journal
        self._in_flight = 0
        self._changed = asyncio.Condition()

    async def reserve(self, question: str, most: Usage) -> int:
        """Enter a request as soon as it fits.

        Args:
            question: hash of what is asked.
            most: what it may cost at most.

        Returns:
            Its number, with which it is closed in one of the three ways below.

        Raises:
            Exhausted: it never will.
        """
        async with self._changed:
            while (reason := self._too_much(most)) is not None:
                if not self._in_flight:
                    raise Exhausted(reason)
                await self._changed.wait()
            self._in_flight += 1
            return self.journal.ask(question, most)

    async def settle(self, number: int, answer: Answer) -> None:
        """The answer is there."""
        self.journal.settle(number, answer)
        await self._close()

    async def release(self, number: int) -> None:
        """The server did not carry it out, so that it cost nothing."""
        self.journal.forget(number)
        await self._close()

    async def lose(self, number: int) -> None:
        """No answer came, and the server may bill it all the same: it stays in the account at its most."""
        await self._close()

    async def _close(self) -> None:
        async with self._changed:
            self._in_flight -= 1
            self._changed.notify_all()

    def price(self, usage: Usage) -> float:
        """What tokens cost, in the unit of the prices."""
        return self.settings.price(usage.tokens_in, usage.tokens_out)

    def note(self) -> str:
        """The account in a few words, for the display."""
        spent = self.journal.spent()
        words = f"{spent.tokens:,} tokens"
        if self.settings.tokens_budget is not None:
            words += f" of {self.settings.tokens_budget:,}"
        if self.settings.price_in + self.settings.price_out:
            words += f", {self.price(spent):.4g}"
            if self.settings.money_budget is not None:
                words += f" of {self.settings.money_budget:.4g}"
        return words

    def _too_much(self, most: Usage) -> str | None:
        """Why a request does not fit now; None if it does."""
        tokens, money = self.settings.tokens_budget, self.settings.money_budget
        spent = self.journal.spent()
        if tokens is not None and spent.tokens + most.tokens > tokens:
            return (
                f"the budget of {tokens:,} tokens does not pay for one more program: {spent.tokens:,} are spent, and "
                f"it may take {most.tokens:,}; raise it with --set factory.endpoint.tokens_budget=TOKENS"
            )
        if money is not None and self.price(spent + most) > money:
            return (
                f"the budget of {money:.4g} does not pay for one more program: {self.price(spent):.4g} is spent, and "
                f"it may cost {self.price(most):.4g}; raise it with --set factory.endpoint.money_budget=MONEY"
            )
        return None
