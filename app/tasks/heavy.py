"""Heavy work: CPU-bound or long. Example to replace by your own."""

import hashlib

from app.celery_app import celery
from app.contracts import ProcessData, TaskName
from app.engine.task import HeavyTask

ROUNDS = 1_000  # of HMAC-SHA-256 an item: about half a millisecond
SHOWN = 100


def derive(data: bytes, index: int) -> bytes:
    """Item `index` of `data`: 16 bytes by PBKDF2-HMAC-SHA-256 (RFC 8018), salted by the index."""
    return hashlib.pbkdf2_hmac("sha256", data, index.to_bytes(8, "big"), ROUNDS, dklen=16)


@celery.task(name=TaskName.PROCESS_DATA, base=HeavyTask, bind=True, pydantic=True)
def process_data(self: HeavyTask, payload: ProcessData) -> dict[str, object]:
    """Derive `iterations` items from `data`; answers the first 100 (hex), how many, and a checksum over all."""
    data = payload.data.encode()
    checksum = hashlib.sha256()
    shown: list[str] = []
    for index in range(payload.iterations):
        item = derive(data, index)
        checksum.update(item)
        if index < SHOWN:
            shown.append(item.hex())
        self.progress(index + 1, payload.iterations)
    return {"processed_items": shown, "total_processed": payload.iterations, "checksum": checksum.hexdigest()}
