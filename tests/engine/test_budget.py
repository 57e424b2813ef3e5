"""Byte budgets (I2): who is admitted when, and what a cancelled waiter leaves behind."""

from __future__ import annotations

import dataclasses

import anyio
import anyio.lowlevel
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orbax_async._engine.budget import BatchSlots, BudgetStatistics, ByteBudget


async def settle() -> None:
    """Lets every other task run until it waits; each hand-over takes a step or two of the loop."""
    for _ in range(12):
        await anyio.lowlevel.checkpoint()


class Borrowers:
    """Tasks that each hold some bytes of one budget until they are told to stop."""

    def __init__(self, budget: ByteBudget, group: anyio.abc.TaskGroup) -> None:
        self.budget = budget
        self.group = group
        self.granted: list[str] = []
        self.scopes: dict[str, anyio.CancelScope] = {}

    async def __call__(self, name: str, nbytes: int) -> None:
        """Starts a borrower, and returns once it either holds its bytes or waits for them."""
        self.scopes[name] = anyio.CancelScope()

        async def borrow() -> None:
            with self.scopes[name]:
                async with self.budget.reserve(nbytes):
                    self.granted.append(name)
                    await anyio.sleep_forever()

        self.group.start_soon(borrow)
        await settle()

    async def stop(self, *names: str) -> None:
        """Stops borrowers, whether they hold their bytes or wait, in one step of the loop."""
        for name in names:
            self.scopes[name].cancel()
        await settle()


async def test_i2_grants_are_first_come_first_served() -> None:
    """Waiters are admitted in the order of their arrival."""
    async with anyio.create_task_group() as group:
        borrow = Borrowers(ByteBudget(10), group)
        for name in "abcd":
            await borrow(name, 10)
        for name in "abc":
            await borrow.stop(name)
        assert borrow.granted == ["a", "b", "c", "d"]
        group.cancel_scope.cancel()


async def test_i2_a_small_request_does_not_overtake_a_large_one() -> None:
    """A request that would fit waits behind a larger one, so that the larger one can't starve."""
    async with anyio.create_task_group() as group:
        borrow = Borrowers(ByteBudget(10), group)
        await borrow("holder", 6)
        await borrow("large", 8)
        await borrow("small", 1)
        assert borrow.granted == ["holder"]
        await borrow.stop("holder")
        assert borrow.granted == ["holder", "large", "small"]
        group.cancel_scope.cancel()


async def test_i2_an_oversize_request_is_admitted_alone() -> None:
    """A request above the limit waits until nothing is held, and then holds everything."""
    async with anyio.create_task_group() as group:
        borrow = Borrowers(ByteBudget(10), group)
        await borrow("small", 1)
        await borrow("oversize", 1000)
        assert borrow.granted == ["small"]
        await borrow.stop("small")
        await borrow("next", 1)
        assert borrow.granted == ["small", "oversize"]
        assert borrow.budget.statistics() == BudgetStatistics(10, 1000, 1000, 1)
        await borrow.stop("oversize")
        assert borrow.granted[-1] == "next"
        group.cancel_scope.cancel()


async def test_i2_a_cancelled_waiter_lets_those_behind_it_in() -> None:
    """The head of the queue leaves, and what fits behind it is admitted at once."""
    async with anyio.create_task_group() as group:
        borrow = Borrowers(ByteBudget(10), group)
        await borrow("holder", 6)
        await borrow("large", 8)
        await borrow("small", 4)
        await borrow.stop("large")
        assert borrow.granted == ["holder", "small"]
        assert borrow.budget.statistics() == BudgetStatistics(10, 10, 10, 0)
        group.cancel_scope.cancel()


async def test_i2_a_grant_that_meets_a_cancellation_is_handed_on() -> None:
    """A waiter that is granted and cancelled within one step of the loop keeps nothing."""
    async with anyio.create_task_group() as group:
        budget = ByteBudget(10)
        await budget.acquire(10)
        borrow = Borrowers(budget, group)
        await borrow("unlucky", 10)
        await borrow("next", 10)
        borrow.scopes["unlucky"].cancel()
        budget.release(10)  # granted to the unlucky one, which has yet to hear of its end
        await settle()
        assert borrow.granted == ["next"]
        assert budget.statistics() == BudgetStatistics(10, 10, 10, 0)
        group.cancel_scope.cancel()


async def test_a_budget_without_a_limit_never_waits() -> None:
    """A limit of None admits everyone, and still counts."""
    budget = ByteBudget(None)
    with anyio.fail_after(5):
        async with budget.reserve(10**12), budget.reserve(10**12):
            assert budget.statistics() == BudgetStatistics(None, 2 * 10**12, 2 * 10**12, 0)
    assert budget.statistics().reserved_nbytes == 0


async def test_bytes_come_back_when_the_holder_fails() -> None:
    """Leaving the block by an error returns the reservation."""
    budget = ByteBudget(10)
    with pytest.raises(ZeroDivisionError):
        async with budget.reserve(10):
            raise ZeroDivisionError
    assert budget.statistics() == BudgetStatistics(10, 0, 10, 0)


async def test_statistics_are_a_snapshot() -> None:
    """What was returned earlier does not change later."""
    budget = ByteBudget(10)
    before = budget.statistics()
    await budget.acquire(3)
    assert before == BudgetStatistics(10, 0, 0, 0)
    with pytest.raises(AttributeError):
        before.peak_nbytes = 1  # type: ignore[misc]


@dataclasses.dataclass
class Model:
    """What a budget should do, written down without any concurrency."""

    limit: int
    held: dict[int, int] = dataclasses.field(default_factory=dict)
    queue: list[tuple[int, int]] = dataclasses.field(default_factory=list)

    def acquire(self, name: int, nbytes: int) -> None:
        """Asks for bytes, behind all who have asked before."""
        self.queue.append((name, nbytes))
        self._grant()

    def stop(self, name: int) -> None:
        """Ends a borrower, wherever it is."""
        self.held.pop(name, None)
        self.queue = [waiter for waiter in self.queue if waiter[0] != name]
        self._grant()

    def _grant(self) -> None:
        while self.queue:
            name, nbytes = self.queue[0]
            if self.held and sum(self.held.values()) + nbytes > self.limit:
                return
            self.held[name] = nbytes
            del self.queue[0]


# Asks for so many bytes, or stops the borrower of that number, modulo how many there are. The flag
# says whether the loop may run before the next step.
ASKS = st.tuples(st.just("ask"), st.integers(1, 14))
STOPS = st.tuples(st.just("stop"), st.integers(0, 30))
STEPS = st.lists(st.tuples(ASKS | STOPS, st.booleans()), max_size=30)


@given(steps=STEPS)
async def test_i2_a_budget_behaves_like_its_model(
    steps: list[tuple[tuple[str, int], bool]],
) -> None:
    """After any asks, stops and cancellations, the same borrowers hold the same bytes."""
    model = Model(10)
    budget = ByteBudget(10)
    holding: dict[int, int] = {}
    scopes: list[anyio.CancelScope] = []

    async def borrow(nbytes: int) -> None:
        name = len(scopes)
        scopes.append(anyio.CancelScope())
        scope = scopes[-1]

        async def hold() -> None:
            with scope:
                await budget.acquire(nbytes)
                holding[name] = nbytes
                assert sum(holding.values()) <= 10 or len(holding) == 1
                try:
                    await anyio.sleep_forever()
                finally:
                    del holding[name]
                    budget.release(nbytes)

        group.start_soon(hold)
        await settle()

    async with anyio.create_task_group() as group:
        for (step, number), settles in steps:
            if step == "ask":
                model.acquire(len(scopes), number)
                await borrow(number)
            elif scopes:
                model.stop(number % len(scopes))
                scopes[number % len(scopes)].cancel()
            if settles:
                await settle()
                assert holding == model.held
                now = budget.statistics()
                assert now.reserved_nbytes == sum(model.held.values())
                assert now.waiting == len(model.queue)
        group.cancel_scope.cancel()
    assert budget.statistics().reserved_nbytes == 0
    assert budget.statistics().waiting == 0


async def test_batches_of_small_pieces_go_one_at_a_time() -> None:
    """Of large pieces three batches are under way at once, of small ones a single one."""
    slots, under_way, peak = BatchSlots(), {"small": 0, "large": 0}, {"small": 0, "large": 0}

    async def work(kind: str, nbytes: int, count: int) -> None:
        async with slots.of(nbytes, count):
            under_way[kind] += 1
            peak[kind] = max(peak[kind], under_way[kind])
            await settle()
            under_way[kind] -= 1

    async with anyio.create_task_group() as group:
        for _ in range(6):
            group.start_soon(work, "small", 4096 << 10, 4096)
            group.start_soon(work, "large", 64 << 20, 16)
    assert peak == {"small": 1, "large": 3}
