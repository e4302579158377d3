"""One pure file per question: a run in, a frozen result out; none imports another."""
