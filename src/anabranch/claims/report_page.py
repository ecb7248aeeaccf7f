"""The two templates of the report (Jinja)."""

from __future__ import annotations

HTML = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Anabranch: claims measured here</title>
<style>
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --line: #d5dae0; --dim: #5b6672;
  --good: #11713a; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --paper: #14171a; --line: #363c43;
  --dim: #9aa5b0; --good: #5fd38d; --bad: #ff8a80; } }
body { margin: 0 auto; max-width: 62rem; padding: 1rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-bottom: 0; }
section { border-top: 1px solid var(--line); margin-top: 2rem; padding-top: .5rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .3rem .6rem .3rem 0;
  border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
td:first-child { min-width: 7rem; }
.number { font-variant-numeric: tabular-nums; }
.good { color: var(--good); font-weight: 600; } .bad { color: var(--bad); font-weight: 600; }
.dim { color: var(--dim); font-size: .9rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem .9rem; }
dt { color: var(--dim); } dd { margin: 0; }
figure { margin: 1rem 0; } svg { max-width: 100%; height: auto; }
@media (max-width: 34rem) { dl { display: block; } dd { margin-bottom: .5rem; } }
</style>
</head>
<body>
<h1>Claims measured on this machine</h1>
<p class="dim">Each claim runs a published method and its baseline on the same data with the same
budget; the threshold was fixed before. <code>anabranch claims run ID</code> measures again.</p>
{% if entries %}
<div class="scroll"><table>
<tr><th>id</th><th>system</th><th>verdict</th><th>held</th><th>seconds</th></tr>
{% for e in entries %}
<tr><td><a href="#{{ e.result.id }}">{{ e.result.id }}</a></td><td>{{ e.result.system }}</td>
<td class="{{ 'good' if e.result.holds else 'bad' }}">{{ e.result.verdict }}</td>
<td class="number">{{ e.held }} of {{ e.runs }}</td>
<td class="number">{{ e.result.seconds }}</td></tr>
{% endfor %}
</table></div>
{% else %}
<p>No claim has been run here yet.</p>
{% endif %}
{% for e in entries %}
<section id="{{ e.result.id }}">
<h2>{{ e.result.id }} {{ e.result.system }}</h2>
<p class="{{ 'good' if e.result.holds else 'bad' }}">{{ e.result.verdict }}</p>
<dl>
<dt>paper</dt><dd>{{ e.result.paper }}</dd>
<dt>baseline</dt><dd>{{ e.result.baseline }}</dd>
<dt>method</dt><dd>{{ e.result.method }}</dd>
<dt>holds if</dt><dd>{{ e.result.threshold }}</dd>
{% if e.result.note %}
<dt>note</dt><dd>{{ e.result.note }}</dd>
{% endif %}
</dl>
{% for drawing in e.drawings %}
<figure>{{ drawing | safe }}</figure>
{% endfor %}
<div class="scroll"><table>
<tr><th>figure</th><th>newest run</th>{% if e.runs > 1 %}<th>earlier runs</th>{% endif %}</tr>
{% for f in e.figures %}
<tr><td>{{ f.name }}</td><td class="number">{{ f.value }}</td>
{% if e.runs > 1 %}
<td class="number">{{ f.earlier }}</td>
{% endif %}
</tr>
{% endfor %}
</table></div>
<p class="dim">{{ e.result.finished }}, {{ e.result.seconds }} s, seeds
{{ e.result.seeds | join(", ") }}; {% for k, v in e.result.machine.items() if v is not none %}
{{ k | replace("_", " ") }} {{ v }}{{ ", " if not loop.last }}{% endfor %};
{% for k, v in e.result.versions.items() %}{{ k }} {{ v }}{{ ", " if not loop.last }}{% endfor %}
</p>
</section>
{% endfor %}
{% if missing %}
<section>
<h2>Not run here yet</h2>
<div class="scroll"><table>
<tr><th>id</th><th>system</th><th>paper</th><th>holds if</th></tr>
{% for c in missing %}
<tr><td>{{ c.id }}</td><td>{{ c.system }}</td><td>{{ c.paper }}</td><td>{{ c.threshold }}</td></tr>
{% endfor %}
</table></div>
</section>
{% endif %}
{% if unreadable %}
<section>
<h2>Files that hold no result</h2>
<ul>
{% for u in unreadable %}
<li><code>{{ u.path }}</code>: {{ u.reason }}</li>
{% endfor %}
</ul>
</section>
{% endif %}
</body>
</html>
"""

MARKDOWN = """\
# Claims measured on this machine

{% if entries %}
| id | system | verdict | held | seconds |
|---|---|---|---|---|
{% for e in entries %}
| {{ e.result.id }} | {{ e.result.system | cell }} | {{ e.result.verdict }} \
| {{ e.held }} of {{ e.runs }} | {{ e.result.seconds }} |
{% endfor %}
{% else %}
No claim has been run here yet.
{% endif %}
{% for e in entries %}

## {{ e.result.id }} {{ e.result.system }}

**{{ e.result.verdict }}**

- paper: {{ e.result.paper }}
- baseline: {{ e.result.baseline }}
- method: {{ e.result.method }}
- holds if: {{ e.result.threshold }}
{% if e.result.note %}
- note: {{ e.result.note }}
{% endif %}
{% for plot in e.result.plots %}

![{{ plot.title }}]({{ plot_name(e, loop.index0) }})
{% endfor %}

| figure | newest run | earlier runs |
|---|---|---|
{% for f in e.figures %}
| {{ f.name | cell }} | {{ f.value | cell }} | {{ f.earlier | cell }} |
{% endfor %}

{{ e.result.finished }}, {{ e.result.seconds }} s, seeds {{ e.result.seeds | join(", ") }};
{% for k, v in e.result.machine.items() if v is not none %}{{ k | replace("_", " ") }} {{ v }}\
{{ ", " if not loop.last }}{% endfor %};
{% for k, v in e.result.versions.items() %}{{ k }} {{ v }}{{ ", " if not loop.last }}{% endfor %}

{% endfor %}
{% if missing %}

## Not run here yet

| id | system | paper | holds if |
|---|---|---|---|
{% for c in missing %}
| {{ c.id }} | {{ c.system | cell }} | {{ c.paper | cell }} | {{ c.threshold | cell }} |
{% endfor %}
{% endif %}
{% if unreadable %}

## Files that hold no result

{% for u in unreadable %}
- `{{ u.path }}`: {{ u.reason | cell }}
{% endfor %}
{% endif %}
"""
