"""Closed and open loop: send requests as the plan says, give a sample for each.

Closed: every client asks again when it was answered. Open: requests arrive when the plan's random process says so,
whether or not earlier ones were answered, and are timed from then.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterator
from itertools import count

from tigerbot_serve.bench.plan import Plan
from tigerbot_serve.bench.reading import Reading, Sample
from tigerbot_serve.bench.wire import Lost, Pool, request_bytes

REFUSED_PAUSE_S = 0.05


class Load:
    """One run in one process.

    Attributes:
        samples: of the requests that are over, in the order of their ends.
        unfinished: requests given up because the run was stopped.
    """

    def __init__(self, plan: Plan, clock: Callable[[], float] = time.perf_counter) -> None:
        self.plan, self._clock = plan, clock
        self.samples: list[Sample] = []
        self.unfinished = 0
        self._pool = Pool(plan.url)
        self._requests = [request_bytes(plan.url, body, plan.headers) for body in plan.bodies]
        self._began = 0.0
        self._stopping = asyncio.Event()
        self._room = asyncio.Semaphore(plan.max_in_flight)

    def stop(self) -> None:
        """Send no more, and give up what is under way: what has been measured so far is the result."""
        self._stopping.set()

    async def run(self) -> list[Sample]:
        """Send until the plan's time or requests are used up, wait for the last answers, give all samples."""
        self._began = self._clock()
        sending = asyncio.create_task(self._closed() if self.plan.loop == "closed" else self._open())
        stopping = asyncio.create_task(self._stopping.wait())
        await asyncio.wait({sending, stopping}, return_when=asyncio.FIRST_COMPLETED)
        for task in (sending, stopping):
            task.cancel()
        await asyncio.gather(sending, stopping, return_exceptions=True)
        if not sending.cancelled() and (failed := sending.exception()):
            raise failed
        self._pool.close()
        return self.samples

    async def _closed(self) -> None:
        numbers = iter(range(self.plan.requests))
        async with asyncio.TaskGroup() as group:
            for _ in range(self.plan.clients):
                group.create_task(self._client(numbers))

    async def _client(self, numbers: Iterator[int]) -> None:
        for number in numbers:
            due = self._now()
            if due >= self.plan.duration_s:
                return
            sample = await self._ask(number, due)
            if sample.error == "connection":  # a refusal costs nothing: clients would spin
                await asyncio.sleep(REFUSED_PAUSE_S)

    async def _open(self) -> None:
        async with asyncio.TaskGroup() as group:
            for number, due in enumerate(arrivals(self.plan)):
                if (wait := due - self._now()) > 0:
                    await asyncio.sleep(wait)
                group.create_task(self._arrived(number, due))

    async def _arrived(self, number: int, due: float) -> None:
        async with self._room:
            await self._ask(number, due)

    async def _ask(self, number: int, due: float) -> Sample:
        reading = Reading(self.plan.stream, self._now)
        request = self._requests[(self.plan.begin + number) % len(self._requests)]
        sent = self._now()
        try:
            async with asyncio.timeout(self.plan.timeout_s):
                connection = await self._pool.take()
                await connection.exchange(request, reading)
            reading.close()
            self._pool.give(connection)
        except TimeoutError:
            reading.error = "timeout"
        except Lost as lost:
            reading.error = reading.error or ("broken stream" if lost.began and self.plan.stream else "connection")
        except OSError:
            reading.error = "connection"
        except asyncio.CancelledError:
            self.unfinished += 1
            raise
        sample = Sample(
            due, sent, reading.event, reading.token, reading.last, self._now(), reading.tokens, reading.error
        )
        self.samples.append(sample)
        return sample

    def _now(self) -> float:
        return self._clock() - self._began


def arrivals(plan: Plan) -> Iterator[float]:
    """When the requests of an open loop are due, in seconds from its begin: exponential gaps, the same for a seed."""
    chance, due = random.Random(plan.seed), 0.0
    for number in count():
        due += chance.expovariate(plan.rate)
        if number >= plan.requests or due >= plan.duration_s:
            return
        yield due
