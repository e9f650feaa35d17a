"""Each fault in the middle of a steady load: nothing accepted is lost, nothing has a visible effect twice."""

import pytest

from tests.faults.campaign import trial
from tests.faults.faults import FAULTS
from tests.faults.load import Rates
from tests.faults.report import Row
from tests.faults.witness import Stalls
from tests.integration.harness import Stack

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]


@pytest.mark.parametrize("name", FAULTS)
async def test_what_was_accepted_ends_once(  # noqa: PLR0913, PLR0917  one a fixture
    stack: Stack, stalls: Stalls, rows: list[Row], factor: float, rates: Rates, name: str
) -> None:
    row = await trial(stack, FAULTS[name], stalls, factor=factor, rates=rates)
    rows.append(row)
    if row.skipped:
        pytest.skip(row.skipped)
    assert row.good, row
