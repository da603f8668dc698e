import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # the slow twins are plain modules beside their tests
