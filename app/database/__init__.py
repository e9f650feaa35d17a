"""MongoDB: the client, the indexes, and one small repository a collection. No query lives anywhere else."""

from app.database.audit import AuditRepository
from app.database.client import create_client, create_worker_client, ensure_indexes
from app.database.documents import Document
from app.database.fulfilments import FulfilmentRepository
from app.database.items import ItemRepository
from app.database.jobs import JobLog, JobOutputs, JobRepository, new_job
from app.database.keys import KeyRepository
from app.database.letters import DeadLetterRepository
from app.database.markers import AlreadyHandledError, MarkerRepository
from app.database.onboarding import NewcomerRepository
from app.database.orders import OrderRepository
from app.database.outbox import OutboxRepository
from app.database.outside import EffectRepository, StockRepository
from app.database.results import ResultReader, TaskResultRepository
from app.database.schedules import FireRepository, ScheduleRepository
from app.database.transactions import in_transaction
from app.database.workflows import WorkflowRepository

__all__ = [
    "AlreadyHandledError",
    "AuditRepository",
    "DeadLetterRepository",
    "Document",
    "EffectRepository",
    "FireRepository",
    "FulfilmentRepository",
    "ItemRepository",
    "JobLog",
    "JobOutputs",
    "JobRepository",
    "KeyRepository",
    "MarkerRepository",
    "NewcomerRepository",
    "OrderRepository",
    "OutboxRepository",
    "ResultReader",
    "ScheduleRepository",
    "StockRepository",
    "TaskResultRepository",
    "WorkflowRepository",
    "create_client",
    "create_worker_client",
    "ensure_indexes",
    "in_transaction",
    "new_job",
]
