"""Where version 0.1.0 had Pager: its pickles name this module."""

from optim8.paging.pager import Pager as Pager
