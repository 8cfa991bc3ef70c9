"""What a sparse run lost, told from that run alone: exact rows, an interval and an estimate for all rows, and verdicts."""

from tl_stream.audit.audit import audit
from tl_stream.audit.next_tokens import NextTokens
from tl_stream.audit.result import Audit, HeadAudit, RowsAudit

__all__ = ["Audit", "HeadAudit", "NextTokens", "RowsAudit", "audit"]
