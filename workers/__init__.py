"""The processes: Celery app, queues, schedule, boot steps, local fleet."""
