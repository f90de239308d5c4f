"""${message}

Before this is committed:
- It runs while an older okavango may still be reading: add first, move data, and drop in a later release.
- A new column of a table that holds rows is nullable, or has a server_default; drop the default afterwards if
  the schema has none.
- Import nothing of okavango here. The schema will move on, and this step must stay what it is.
- Every constraint and index carries its name, as the naming convention of platform/catalog/schema.py makes it.
- Large tables on PostgreSQL: build indexes with postgresql_concurrently in a step of their own; set a lock_timeout.
- On SQLite a table is copied inside op.batch_alter_table; foreign keys are off meanwhile and checked at the end.
- downgrade() undoes upgrade(), or raises with the reason why it cannot.
tests/guards/test_migrations.py runs it up and down on both databases.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
${imports if imports else ""}
revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
branch_labels = ${repr(branch_labels)}
depends_on = ${repr(depends_on)}


def upgrade() -> None:
    ${upgrades if upgrades else "pass"}


def downgrade() -> None:
    ${downgrades if downgrades else "pass"}
