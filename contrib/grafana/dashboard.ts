// The dashboard of xnbd-server and xnbd-wrapper. "npm run build" makes xnbd.json of it, which Grafana imports.
//
// What each number means, and what to do when it is bad, stands in contrib/doc/operations.rst, "Metrics".
import {
  type AnnotationQuery,
  type Dashboard,
  DashboardCursorSync,
  GraphDrawStyle,
  StackingMode,
  type VariableModel,
  VariableRefresh,
  VariableSort,
} from "@grafana/schema";
import { graph, heatmap, placed, prometheus, redBelow, redFrom, row, stat, table } from "./panels.js";

const INSTANCE = 'instance=~"$instance"';
const CHOSEN = `${INSTANCE}, export=~"$export"`;
const EXPORT = "instance, export";
const LEGEND = "{{instance}} {{export}}";

const now = (metric: string): string => `${metric}{${CHOSEN}}`;
const rate = (metric: string): string => `rate(${now(metric)}[$__rate_interval])`;
const increase = (metric: string, time = "$__rate_interval"): string => `increase(${now(metric)}[${time}])`;
const busiest = (expr: string): string => `topk(10, ${expr})`;

const BUCKETS = rate("xnbd_request_duration_seconds_bucket");
const quantile = (part: number, by = ""): string => `histogram_quantile(${part}, sum by (${by}le) (${BUCKETS}))`;

const HITS = rate("xnbd_cache_hits_total");
const MISSES = rate("xnbd_cache_misses_total");
const hitShare = (by = ""): string => `sum${by} (${HITS}) / (sum${by} (${HITS}) + sum${by} (${MISSES}))`;

const meanDuration = ["sum", "count"]
  .map((part) => `sum by (${EXPORT}) (${rate(`xnbd_request_duration_seconds_${part}`)})`)
  .join(" / ");

const BARS = { drawStyle: GraphDrawStyle.Bars, fillOpacity: 60 };
const STACKED = { fillOpacity: 40, stacking: { mode: StackingMode.Normal, group: "A" } };

const overview = row("At a glance", [
  stat(
    { title: "Servers", description: "Servers and wrappers that answer.", unit: "short" },
    `count(xnbd_build_info{${INSTANCE}})`,
  ),
  stat({ title: "Clients", description: "Clients that are connected.", unit: "short" }, `sum(${now("xnbd_clients")})`),
  stat(
    { title: "Requests", description: "Requests answered a second.", unit: "reqps" },
    `sum(${rate("xnbd_requests_total")})`,
  ),
  stat(
    { title: "Read and written", description: "Bytes a second.", unit: "binBps" },
    `sum(${rate("xnbd_bytes_total")})`,
  ),
  stat({ title: "p99", description: "99 of 100 requests took no longer.", unit: "s" }, quantile(0.99)),
  stat(
    { title: "Hits", description: "Requests to proxies that had not to wait for the origin.", unit: "percentunit" },
    hitShare(),
  ),
  stat(
    { title: "Errors, 1 h", description: "Requests that got an error in the last hour. See the log.", unit: "short" },
    `sum(${increase("xnbd_request_errors_total", "1h")})`,
    redFrom(1),
  ),
  stat(
    { title: "Deaths, 1 h", description: "Processes with a client that died. See the log.", unit: "short" },
    `sum(${increase("xnbd_worker_deaths_total", "1h")})`,
    redFrom(1),
  ),
]);

const clients = row("Clients", [
  graph({ title: "Throughput", description: "Bytes that clients read and write.", unit: "binBps", width: 8 }, [
    { expr: `sum by (direction) (${rate("xnbd_bytes_total")})`, legend: "{{direction}}" },
  ]),
  graph(
    { title: "Requests by command", description: "Requests answered, with errors too.", unit: "reqps", width: 8 },
    [{ expr: `sum by (command) (${rate("xnbd_requests_total")}) > 0`, legend: "{{command}}" }],
    STACKED,
  ),
  graph({ title: "Busiest exports", description: "The ten that read and write most.", unit: "binBps", width: 8 }, [
    { expr: busiest(`sum by (${EXPORT}) (${rate("xnbd_bytes_total")})`), legend: LEGEND },
  ]),
  heatmap(
    {
      title: "How long requests took",
      description: "From the receipt of a request to the departure of its reply.",
      unit: "s",
      width: 12,
    },
    `sum by (le) (${BUCKETS})`,
  ),
  graph(
    {
      title: "p50 and p99 by command",
      description: "Half of the requests, and 99 of 100, took no longer.",
      unit: "s",
      width: 12,
    },
    [
      { expr: quantile(0.5, "command, "), legend: "{{command}} p50" },
      { expr: quantile(0.99, "command, "), legend: "{{command}} p99" },
    ],
  ),
  graph({ title: "Mean duration", description: "Of the ten slowest exports.", unit: "s", width: 8 }, [
    { expr: busiest(meanDuration), legend: LEGEND },
  ]),
  graph(
    { title: "Connected clients", description: "At the limit others wait: --max-clients.", unit: "short", width: 8 },
    [
      { expr: `sum by (instance) (${now("xnbd_clients")})`, legend: "{{instance}}" },
      { expr: `xnbd_clients_limit{${INSTANCE}}`, legend: "{{instance}} limit" },
    ],
  ),
  graph(
    {
      title: "Errors",
      description: "EIO and ENOSPC are the disk's, EINVAL and EPERM the client's. The log names them.",
      unit: "short",
      width: 8,
    },
    [
      {
        expr: `sum by (${EXPORT}, command, errno) (${increase("xnbd_request_errors_total")}) > 0`,
        legend: `${LEGEND} {{command}} {{errno}}`,
      },
    ],
    BARS,
  ),
  graph(
    {
      title: "Deaths of processes",
      description: "Each lost its client. The log says by which signal.",
      unit: "short",
      width: 8,
    },
    [{ expr: increase("xnbd_worker_deaths_total"), legend: LEGEND }],
    BARS,
  ),
  graph(
    {
      title: "Requests that wait",
      description: "For blocks from the origin. Many for long: the origin is slow or away.",
      unit: "short",
      width: 8,
    },
    [{ expr: busiest(now("xnbd_waiting_requests")), legend: LEGEND }],
  ),
  graph({ title: "Memory of requests that wait", description: "What they hold.", unit: "bytes", width: 8 }, [
    { expr: busiest(now("xnbd_waiting_bytes")), legend: LEGEND },
  ]),
  graph(
    {
      title: "Clients held by limits",
      description: "Those that wait because of limits: now, and on average. --limit changes the limits.",
      unit: "short",
      width: 8,
    },
    [
      { expr: busiest(now("xnbd_limited_clients")), legend: `${LEGEND} now` },
      { expr: busiest(rate("xnbd_limited_seconds_total")), legend: `${LEGEND} on average` },
    ],
  ),
  graph(
    {
      title: "Requests held by limits",
      description: "Requests that were received after their client had to wait because of limits.",
      unit: "reqps",
      width: 8,
    },
    [{ expr: busiest(rate("xnbd_limited_requests_total")), legend: LEGEND }],
  ),
]);

const proxies = row("Proxies", [
  graph(
    {
      title: "Hits",
      description: "Low at first. Low for ever: clients read everything once.",
      unit: "percentunit",
      width: 8,
    },
    [{ expr: hitShare(` by (${EXPORT})`), legend: LEGEND }],
  ),
  graph(
    {
      title: "Cache filled",
      description: "At 100 % the origin is not needed any more, and --switch works.",
      unit: "percentunit",
      width: 8,
    },
    [{ expr: `${now("xnbd_cached_bytes")} / ${now("xnbd_disk_bytes")}`, legend: LEGEND }],
  ),
  graph(
    {
      title: "Written here",
      description: "By clients. The origins do not have it: it is lost with the cache.",
      unit: "bytes",
      width: 8,
    },
    [{ expr: now("xnbd_written_bytes"), legend: LEGEND }],
  ),
  graph(
    {
      title: "Share of --cache-limit",
      description: "What was fetched and can be let go again. At 100 % for long: what is read is not kept; see the log.",
      unit: "percentunit",
      width: 8,
    },
    [{ expr: `${now("xnbd_cache_clean_bytes")} / ${now("xnbd_cache_limit_bytes")}`, legend: LEGEND }],
  ),
  graph(
    {
      title: "Let go of caches",
      description: "Because of --cache-limit. As much as is fetched, with few hits: the limit is too low for what is used.",
      unit: "binBps",
      width: 8,
    },
    [{ expr: busiest(rate("xnbd_cache_let_go_bytes_total")), legend: LEGEND }],
  ),
  graph(
    {
      title: "Fetched from origins",
      description: "More than clients read: read-ahead that nobody uses.",
      unit: "binBps",
      width: 8,
    },
    [{ expr: busiest(rate("xnbd_origin_bytes_total")), legend: LEGEND }],
  ),
  graph(
    {
      title: "Origin up",
      description: "0: a process tries in vain to reach it. xnbd-bgctl --query says why.",
      unit: "short",
      width: 8,
    },
    [{ expr: now("xnbd_origin_up"), legend: LEGEND }],
  ),
  graph(
    {
      title: "Each of several origins up",
      description: "0: unreachable, slow, or another disk. xnbd-bgctl --query says which.",
      unit: "short",
      width: 8,
    },
    [{ expr: now("xnbd_origin_endpoint_up"), legend: `${LEGEND} {{origin}}` }],
  ),
  graph(
    {
      title: "Latency of each of several origins",
      description: "How long an answer takes. The others take over from one that is much slower.",
      unit: "s",
      width: 8,
    },
    [{ expr: now("xnbd_origin_endpoint_latency_seconds"), legend: `${LEGEND} {{origin}}` }],
  ),
  graph(
    {
      title: "Fetched from each of several origins",
      description: "Healthy ones share the load as quick as they are.",
      unit: "binBps",
      width: 8,
    },
    [{ expr: rate("xnbd_origin_endpoint_bytes_total"), legend: `${LEGEND} {{origin}}` }],
  ),
  graph(
    {
      title: "Connections to origins, and returns",
      description: "How often one answered again. Several times in an hour: look at the network.",
      unit: "short",
      width: 8,
    },
    [
      { expr: now("xnbd_origin_connections"), legend: `${LEGEND} connections` },
      { expr: increase("xnbd_origin_reconnects_total"), legend: `${LEGEND} returns` },
    ],
  ),
  graph(
    { title: "Copy of all blocks", description: "What --cache-all has fetched so far.", unit: "bytes", width: 8 },
    [{ expr: `${now("xnbd_copy_bytes")} * ${now("xnbd_copy_running")}`, legend: LEGEND }],
  ),
  graph(
    {
      title: "Age of the last checkpoint",
      description: "While something is new. A power failure would cost what came since.",
      unit: "s",
      width: 8,
    },
    [
      {
        expr: `${now("xnbd_checkpoint_age_seconds")} * (${now("xnbd_checkpoint_pending_pages")} > bool 0)`,
        legend: LEGEND,
      },
    ],
  ),
  graph(
    {
      title: "Duration of checkpoints",
      description: "Longer and longer: the disk cannot keep up.",
      unit: "s",
      width: 8,
    },
    [{ expr: now("xnbd_checkpoint_duration_seconds"), legend: LEGEND }],
  ),
  graph(
    {
      title: "Pages that the next checkpoint saves",
      description: "Of the bitmap. 0: all is durable.",
      unit: "short",
      width: 8,
    },
    [{ expr: now("xnbd_checkpoint_pending_pages"), legend: LEGEND }],
  ),
]);

const disks = row("Disks", [
  graph(
    {
      title: "Space left",
      description: "On the file system of the image or cache; the ten with the least.",
      unit: "bytes",
      width: 8,
    },
    [{ expr: `bottomk(10, ${now("xnbd_storage_available_bytes")})`, legend: LEGEND }],
  ),
  graph(
    {
      title: "Faults",
      description:
        "Write-back failed: every flush fails until a restart. No room: what is fetched is not kept. " +
        "Damaged blocks: they are fetched again; look after the disk.",
      unit: "short",
      width: 8,
    },
    [
      { expr: now("xnbd_write_back_failed"), legend: `${LEGEND} write-back failed` },
      { expr: now("xnbd_cache_reads_through"), legend: `${LEGEND} no room` },
      { expr: increase("xnbd_cache_damaged_blocks_total"), legend: `${LEGEND} damaged blocks` },
    ],
  ),
  graph(
    { title: "Snapshots", description: "Made, failed, and under way.", unit: "short", width: 8 },
    [
      { expr: increase("xnbd_snapshots_total"), legend: `${LEGEND} {{outcome}}` },
      { expr: now("xnbd_snapshot_running"), legend: `${LEGEND} running` },
    ],
    BARS,
  ),
  graph(
    { title: "Bytes of a snapshot under way", description: "It waits if they stand still.", unit: "bytes", width: 8 },
    [{ expr: now("xnbd_snapshot_bytes"), legend: LEGEND }],
  ),
  table({ title: "Sizes", description: "Of the disks.", unit: "bytes", width: 16 }, now("xnbd_disk_bytes"), []),
]);

const programs = row("Programs", [
  stat(
    { title: "Certificates end in", description: "The first one. Put a new one there, and reload.", unit: "s" },
    `min(xnbd_tls_certificate_expiry_seconds{${INSTANCE}})`,
    redBelow(14 * 86400),
  ),
  graph({ title: "Certificates", description: "Time until those in the file end.", unit: "s", width: 9 }, [
    { expr: `xnbd_tls_certificate_expiry_seconds{${INSTANCE}}`, legend: "{{instance}} {{file}}" },
  ]),
  table(
    { title: "Versions", description: "What runs where.", unit: "short", width: 12 },
    `xnbd_build_info{${INSTANCE}}`,
    ["Value"],
  ),
]);

/** A choice of labels; all of them at first. The types do not know "definition", which Grafana's editor wants. */
function choice(name: string, label: string, query: string): VariableModel & { definition: string } {
  return {
    type: "query",
    name,
    label,
    datasource: prometheus,
    query: { query, refId: name },
    definition: query,
    refresh: VariableRefresh.onTimeRangeChanged,
    sort: VariableSort.alphabeticalAsc,
    multi: true,
    includeAll: true,
    allValue: ".*",
    current: { text: "All", value: "$__all" },
  };
}

const starts: AnnotationQuery & { expr: string; titleFormat: string } = {
  name: "Starts",
  datasource: prometheus,
  enable: true,
  iconColor: "blue",
  expr: `changes(xnbd_start_time_seconds{${INSTANCE}}[$__rate_interval]) > 0`,
  titleFormat: "{{instance}} was started",
};

export const dashboard: Dashboard = {
  uid: "xnbd",
  title: "xNBD",
  description: "Servers and wrappers of xNBD that run with --metrics.",
  tags: ["nbd", "storage"],
  schemaVersion: 41,
  editable: true,
  graphTooltip: DashboardCursorSync.Crosshair,
  refresh: "10s",
  time: { from: "now-1h", to: "now" },
  templating: {
    list: [
      { type: "datasource", name: "datasource", label: "Prometheus", query: "prometheus" },
      choice("instance", "Server", "label_values(xnbd_build_info, instance)"),
      choice("export", "Export", `label_values(xnbd_clients{${INSTANCE}}, export)`),
    ],
  },
  annotations: { list: [starts] },
  panels: placed([...overview, ...clients, ...proxies, ...disks, ...programs]),
};
