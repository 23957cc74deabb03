"""When is a remote engine given up? From what is heard of it, and from how long nothing is.

Three things prove three things: a pong that the worker's loop runs, a token that the engine
computes, and a canary, one request of one token, that it still takes requests. An engine with work
is only asked for a canary when no token comes. A canary that waits behind a full batch which goes
on is no fault. One that waits while the engine says that it does steps, but gives nobody a token,
may wait behind a long prompt, and is waited for longer: engines were seen to step for ever and
schedule nothing. Times are seconds of the caller's clock; nothing here waits.
"""

from __future__ import annotations

from serve_app.engines.remote.launch import Deadlines


class Pulse:
    """What is known of a running engine's life."""

    def __init__(self, deadlines: Deadlines, now_s: float) -> None:
        self._deadlines = deadlines
        self._progress_s = now_s
        self._stepped_s = now_s
        self._pinged_s = now_s
        self._unanswered: int | None = None
        self._num_pings = 0
        self._canary_s: float | None = None
        self._canary_end_s = now_s

    def progress(self, now_s: float) -> None:
        """It has given a token, or ended a request."""
        self._progress_s = self._stepped_s = now_s

    def stepped(self, now_s: float) -> None:
        """It says that it has done a step."""
        self._stepped_s = now_s

    def pong(self, number: int) -> None:
        """Its loop has answered a ping."""
        if number == self._unanswered:
            self._unanswered = None

    def canary_ended(self, now_s: float) -> None:
        """It has answered the canary."""
        self._canary_s, self._canary_end_s = None, now_s
        self.progress(now_s)

    def next_ping(self, now_s: float) -> int | None:
        """The number of a ping that is due now."""
        if self._unanswered is not None or now_s - self._pinged_s < self._deadlines.ping_every_s:
            return None
        self._num_pings += 1
        self._pinged_s, self._unanswered = now_s, self._num_pings
        return self._num_pings

    def needs_canary(self, now_s: float, *, has_work: bool) -> bool:
        """Whether one is due now; it is taken as sent then."""
        if self._canary_s is not None:
            return False
        limits = self._deadlines
        quiet_s = now_s - max(self._progress_s, self._canary_end_s)
        if quiet_s < (limits.quiet_s if has_work else limits.canary_every_s):
            return False
        self._canary_s = now_s
        return True

    def fault(self, now_s: float) -> str | None:
        """Why it must be given up, None while it need not."""
        silent_s = now_s - self._pinged_s
        if self._unanswered is not None and silent_s > self._deadlines.pong_s:
            return f"its process has not answered for {silent_s:.0f} s"
        if self._canary_s is not None:
            limits = self._deadlines
            silent_s = now_s - max(self._canary_s, self._progress_s)
            steps = now_s - self._stepped_s <= limits.canary_s
            if silent_s > (limits.canary_in_steps_s if steps else limits.canary_s):
                doing = "has done steps and computed nothing" if steps else "has computed nothing"
                return f"it {doing} for {silent_s:.0f} s, not even the one token of a health check"
        return None
