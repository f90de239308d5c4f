"""The catalog: bases, datasets, adapters, their versions and aliases, jobs."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

TIME = sa.DateTime(timezone=True)
NULLABLE_JSON = sa.JSON(none_as_null=True)
JOB_STATES = "state IN ('queued', 'running', 'paused', 'succeeded', 'failed', 'cancelled')"
VERSION_STATES = "state IN ('registered', 'ready', 'bound', 'refused', 'retired')"


def upgrade() -> None:
    _create_bases()
    _create_datasets()
    _create_jobs()
    _create_adapters()
    _create_adapter_versions()
    _create_aliases()


def downgrade() -> None:
    for table in ("aliases", "adapter_versions", "adapters", "jobs", "datasets", "bases"):
        op.drop_table(table)


def _create_bases() -> None:
    op.create_table(
        "bases",
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("digest", sa.String(), nullable=False),
        sa.Column("components", sa.JSON(), nullable=False),
        sa.Column("location", sa.String(), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("updated_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_bases")),
    )


def _create_datasets() -> None:
    op.create_table(
        "datasets",
        sa.Column("digest", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("location", sa.String(), nullable=False),
        sa.Column("rows", sa.Integer(), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.CheckConstraint("rows >= 0", name=op.f("ck_datasets_rows")),
        sa.PrimaryKeyConstraint("digest", name=op.f("pk_datasets")),
    )


def _create_jobs() -> None:
    op.create_table(
        "jobs",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("spec", sa.JSON(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("principal", sa.String(), nullable=False),
        sa.Column("worker", sa.String(), nullable=True),
        sa.Column("lease_until", TIME, nullable=True),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("cancel_requested", sa.Boolean(), nullable=False),
        sa.Column("progress", NULLABLE_JSON, nullable=True),
        sa.Column("result", NULLABLE_JSON, nullable=True),
        sa.Column("error", sa.String(), nullable=True),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("updated_at", TIME, nullable=False),
        sa.Column("started_at", TIME, nullable=True),
        sa.Column("finished_at", TIME, nullable=True),
        sa.CheckConstraint("attempts >= 0", name=op.f("ck_jobs_attempts")),
        sa.CheckConstraint(JOB_STATES, name=op.f("ck_jobs_state")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_jobs")),
    )
    op.create_index(op.f("ix_jobs_state_created_at"), "jobs", ["state", "created_at"])


def _create_adapters() -> None:
    op.create_table(
        "adapters",
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("base", sa.String(), nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.ForeignKeyConstraint(["base"], ["bases.name"], name=op.f("fk_adapters_base")),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_adapters")),
    )


def _create_adapter_versions() -> None:
    op.create_table(
        "adapter_versions",
        sa.Column("adapter", sa.String(), nullable=False),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("digest", sa.String(), nullable=False),
        sa.Column("base", sa.String(), nullable=False),
        sa.Column("base_digest", sa.String(), nullable=False),
        sa.Column("components", sa.JSON(), nullable=False),
        sa.Column("modalities", sa.JSON(), nullable=False),
        sa.Column("lineage", sa.JSON(), nullable=False),
        sa.Column("metrics", sa.JSON(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("verification", NULLABLE_JSON, nullable=True),
        sa.Column("error", sa.String(), nullable=True),
        sa.Column("principal", sa.String(), nullable=False),
        sa.Column("job_id", sa.String(), nullable=True),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("updated_at", TIME, nullable=False),
        sa.CheckConstraint("number >= 1", name=op.f("ck_adapter_versions_number")),
        sa.CheckConstraint(VERSION_STATES, name=op.f("ck_adapter_versions_state")),
        sa.ForeignKeyConstraint(["adapter"], ["adapters.name"], name=op.f("fk_adapter_versions_adapter")),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_adapter_versions_job_id")),
        sa.PrimaryKeyConstraint("adapter", "number", name=op.f("pk_adapter_versions")),
        sa.UniqueConstraint("adapter", "digest", name=op.f("uq_adapter_versions_adapter_digest")),
    )


def _create_aliases() -> None:
    op.create_table(
        "aliases",
        sa.Column("adapter", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("previous", sa.Integer(), nullable=True),
        sa.Column("updated_at", TIME, nullable=False),
        sa.ForeignKeyConstraint(["adapter"], ["adapters.name"], name=op.f("fk_aliases_adapter")),
        sa.ForeignKeyConstraint(
            ["adapter", "version"],
            ["adapter_versions.adapter", "adapter_versions.number"],
            name=op.f("fk_aliases_adapter_version"),
        ),
        sa.PrimaryKeyConstraint("adapter", "name", name=op.f("pk_aliases")),
    )
