// A file is chosen or dropped, and sent at once.
export default {
  template: `
    <div :class="['drop', { over }]" @dragover.prevent="over = true" @dragleave="over = false"
         @drop.prevent="dropped">
      <label>{{ label }}<input ref="input" type="file" @change="chosen" /></label>
      <span class="dim small" role="status">{{ status || hint }}</span>
    </div>`,
  props: { label: String, url: String, hint: { type: String, default: "" } },
  data() {
    return { over: false, status: "" };
  },
  methods: {
    chosen() {
      this.send(this.$refs.input.files[0]);
    },
    dropped(event) {
      this.over = false;
      this.send(event.dataTransfer.files[0]);
    },
    send(file) {
      if (!file) return;
      const form = new FormData();
      form.append(file.name, file, file.name);
      const request = new XMLHttpRequest();
      request.upload.onprogress = (event) => {
        this.status = `sending ${file.name}: ${Math.round((100 * event.loaded) / event.total)} %`;
      };
      request.onload = () => {
        this.status = request.status === 200 ? "" : this.refusal(request);
      };
      request.onerror = () => {
        this.status = `${file.name} could not be sent: the connection broke; choose it again`;
      };
      request.open("POST", (window.path_prefix || "") + this.url);
      request.send(form);
      this.$refs.input.value = "";
    },
    refusal(request) {
      try {
        return JSON.parse(request.responseText).error.message;
      } catch {
        return `the server answered with status ${request.status}; its log says why`;
      }
    },
    reset() {},
  },
};
