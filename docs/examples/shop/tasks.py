import time

from celery import chain, chord
from celery.utils.log import get_task_logger

from .celery import app

logger = get_task_logger(__name__)

#: Prices in cents.
PRICES = {"tea": 450, "cup": 1200, "pot": 3900, "tray": 2550}


class BankIsBusy(Exception):
    pass


@app.task
def price(item):
    return PRICES[item]


@app.task
def total(prices):
    return sum(prices)


@app.task
def reserve(order_number, item):
    logger.info("order %s: one %s reserved", order_number, item)
    return {"order": order_number, "item": item, "cents": PRICES[item]}


@app.task(bind=True, max_retries=5)
def charge(self, order):
    """The bank is busy whenever it is asked for the first time."""
    if self.request.retries == 0:
        raise self.retry(exc=BankIsBusy(order["order"]), countdown=0.5)
    return {**order, "charged_after_attempts": self.request.retries + 1}


@app.task
def send_receipt(order):
    logger.info("order %s: receipt sent", order["order"])
    return f"order {order['order']}: {order['item']} for {order['cents'] / 100:.2f}"


@app.task
def wrap(parcel_number):
    time.sleep(0.02)
    return parcel_number


@app.task
def look_through_shelves():
    """Runs every two seconds, sent by ``celery beat``."""
    logger.info("%s kinds of things on the shelves", len(PRICES))


def place_order(order_number, item):
    """Three tasks, each with the result of the one before."""
    steps = chain(reserve.s(order_number, item), charge.s(), send_receipt.s())
    return steps.apply_async()


def price_of_basket(items):
    """One task for each item, side by side, and one more with all their results."""
    return chord(price.s(item) for item in items)(total.s())
