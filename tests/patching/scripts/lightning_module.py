import pytorch_lightning as pl
from types import SimpleNamespace

hp = SimpleNamespace(
    lr = 2e-5,
    train_bs = 8, valid_bs = 16,
    n_epochs = 4)


class Tagger(pl.LightningModule):
    def __init__(self, hp, batch_size=1):
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=hp.train_bs)

    def val_dataloader(self):
        return DataLoader(self.valid, batch_size=hp.valid_bs)


trainer = pl.Trainer(max_epochs=hp.n_epochs, accumulate_grad_batches=4, precision=16)
trainer.fit(Tagger(hp))
