"""`python -m demo`: runs `denoise.py`; what the user can put right becomes one line, status 1.

In: command-line options (`--help`). Out: `denoise.main`'s. Called by `make demo`.
"""

import sys

from .errors import DemoError

try:
    from .denoise import main
except ImportError as error:
    sys.exit(f"demo: {error}. `make demo` installs and builds what is needed.")

try:
    main()
except DemoError as error:
    sys.exit(f"demo: {error}")
except KeyboardInterrupt:
    sys.exit("demo: stopped")
