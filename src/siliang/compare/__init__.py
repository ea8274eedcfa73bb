"""Which method is best on one's own data: every method with every seed on one base model, as records."""

from siliang.callable_packages import make_callable

make_callable(__name__)
