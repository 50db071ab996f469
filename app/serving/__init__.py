"""The HTTP service: requests in, answers out, one model behind them."""
