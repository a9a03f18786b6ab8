from celery import Celery

app = Celery("shop", include=["shop.tasks"])
app.config_from_object("shop.celeryconfig")
