"""The training service: priorities, pauses and events of jobs; uploaded files."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

TIME = sa.DateTime(timezone=True)


def upgrade() -> None:
    with op.batch_alter_table("jobs") as jobs:
        jobs.add_column(sa.Column("labels", sa.JSON(none_as_null=True), nullable=True))
        jobs.add_column(sa.Column("losses", sa.Integer(), nullable=False, server_default="0"))
        jobs.add_column(sa.Column("priority", sa.Integer(), nullable=False, server_default="0"))
        jobs.add_column(sa.Column("pause_requested", sa.Boolean(), nullable=False, server_default=sa.false()))
        jobs.drop_index("ix_jobs_state_created_at")
        jobs.create_index("ix_jobs_state_priority_created_at", ["state", "priority", "created_at"])
    with op.batch_alter_table("jobs") as jobs:
        # The defaults were for the rows that were there.
        jobs.alter_column("losses", server_default=None)
        jobs.alter_column("priority", server_default=None)
        jobs.alter_column("pause_requested", server_default=None)
    op.create_table(
        "job_events",
        sa.Column("job_id", sa.String(), nullable=False),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("level", sa.String(), nullable=False),
        sa.Column("message", sa.String(), nullable=False),
        sa.Column("data", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("created_at", TIME, nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_job_events_job_id")),
        sa.PrimaryKeyConstraint("job_id", "number", name=op.f("pk_job_events")),
    )
    op.create_table(
        "files",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("purpose", sa.String(), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("digest", sa.String(), nullable=False),
        sa.Column("principal", sa.String(), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.CheckConstraint("bytes >= 0", name=op.f("ck_files_bytes")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_files")),
    )
    op.create_index(op.f("ix_files_principal_created_at"), "files", ["principal", "created_at"])


def downgrade() -> None:
    op.drop_table("files")
    op.drop_table("job_events")
    with op.batch_alter_table("jobs") as jobs:
        jobs.drop_index("ix_jobs_state_priority_created_at")
        jobs.drop_column("pause_requested")
        jobs.drop_column("priority")
        jobs.drop_column("losses")
        jobs.drop_column("labels")
        jobs.create_index("ix_jobs_state_created_at", ["state", "created_at"])
