"""MongoDB: the client, the indexes, and one small repository a collection. No query lives anywhere else."""

from app.database.client import create_client, create_worker_client, ensure_indexes
from app.database.documents import Document
from app.database.items import ItemRepository
from app.database.keys import KeyRepository
from app.database.letters import DeadLetterRepository
from app.database.outside import EffectRepository, StockRepository
from app.database.results import ResultReader, TaskResultRepository

__all__ = [
    "DeadLetterRepository",
    "Document",
    "EffectRepository",
    "ItemRepository",
    "KeyRepository",
    "ResultReader",
    "StockRepository",
    "TaskResultRepository",
    "create_client",
    "create_worker_client",
    "ensure_indexes",
]
