"""MongoDB: the client, the indexes, and one small repository a collection. No query lives anywhere else."""

from app.database.client import create_client, create_worker_client, ensure_indexes
from app.database.documents import Document
from app.database.items import ItemRepository
from app.database.keys import KeyRepository
from app.database.letters import DeadLetterRepository
from app.database.onboarding import NewcomerRepository
from app.database.outside import EffectRepository, StockRepository
from app.database.results import ResultReader, TaskResultRepository
from app.database.workflows import WorkflowRepository

__all__ = [
    "DeadLetterRepository",
    "Document",
    "EffectRepository",
    "ItemRepository",
    "KeyRepository",
    "NewcomerRepository",
    "ResultReader",
    "StockRepository",
    "TaskResultRepository",
    "WorkflowRepository",
    "create_client",
    "create_worker_client",
    "ensure_indexes",
]
