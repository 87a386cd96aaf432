from transformers import Seq2SeqTrainingArguments, Seq2SeqTrainer

training_args = Seq2SeqTrainingArguments(
    output_dir="./t5-naïve-résumé 🤗", per_device_train_batch_size=8, per_device_eval_batch_size=8,
    predict_with_generate=True,
    learning_rate=5e-5,
)
trainer = Seq2SeqTrainer(model=model, args=training_args, train_dataset=train)
trainer.train()
