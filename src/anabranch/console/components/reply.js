// An answer: plain text while it is written, formatted when it is complete.
//
// append(start, text) puts text at a place, so that a message that comes twice changes nothing.
export default {
  template: `
    <div class="reply-text" :aria-busy="running ? 'true' : 'false'">
      <div v-if="!html" class="plain">{{ shown }}<span v-if="running" class="caret" aria-hidden="true"></span></div>
      <div v-show="html" ref="formatted" class="formatted"></div>
    </div>`,
  props: {
    text: { type: String, default: "" },
    html: { type: String, default: "" },
    running: { type: Boolean, default: false },
  },
  data() {
    return { shown: this.text };
  },
  watch: {
    html() { this.format(); },
    text(value) { if (value.length >= this.shown.length) this.shown = value; },
  },
  mounted() {
    this.format();
    this.follow();
  },
  methods: {
    append(start, text) {
      const following = nearBottom();
      this.shown = this.shown.slice(0, start) + text;
      if (following) this.follow();
    },
    format() {
      if (!this.html) return;
      const following = nearBottom();
      this.$refs.formatted.setHTML(this.html); // sanitised: a model wrote it
      for (const link of this.$refs.formatted.querySelectorAll("a")) {
        link.rel = "noopener noreferrer nofollow";
        link.target = "_blank";
      }
      for (const block of this.$refs.formatted.querySelectorAll("pre")) block.tabIndex = 0;
      if (following) this.follow();
    },
    follow() {
      this.$nextTick(() => window.scrollTo({ top: document.documentElement.scrollHeight }));
    },
  },
};

function nearBottom() {
  const page = document.documentElement;
  return page.scrollHeight - window.scrollY - window.innerHeight < 160;
}
