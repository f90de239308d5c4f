// Files go where they are kept as they come, with their progress; then the page is told the new file's id.
const field = element.querySelector("input");
const zone = element.querySelector(".okv-zone");
const status = element.querySelector(".okv-upload-status");

const say = (text, isFault = false) => {
  status.textContent = text;
  status.classList.toggle("okv-bad", isFault);
};

const send = (file) => {
  const form = new FormData();
  form.append("purpose", "fine-tune");
  form.append("file", file);
  const call = new XMLHttpRequest();
  call.open("POST", zone.dataset.to);
  call.upload.onprogress = (event) => say(`${file.name}: ${Math.floor((100 * event.loaded) / event.total)} %`);
  call.onerror = () => say("The connection broke: choose the file again.", true);
  call.onload = () => {
    field.value = "";
    let answer = {};
    try {
      answer = JSON.parse(call.responseText);
    } catch {
      // A proxy's own page: its status has to do.
    }
    if (call.status !== 200) return say(answer.error?.message ?? `Refused with status ${call.status}.`, true);
    say("");
    trigger("uploaded", { id: answer.id });
  };
  call.send(form);
};

field.addEventListener("change", () => field.files.length && send(field.files[0]));
zone.addEventListener("dragover", (event) => {
  event.preventDefault();
  zone.classList.add("okv-over");
});
zone.addEventListener("dragleave", () => zone.classList.remove("okv-over"));
zone.addEventListener("drop", (event) => {
  event.preventDefault();
  zone.classList.remove("okv-over");
  if (event.dataTransfer.files.length) send(event.dataTransfer.files[0]);
});
