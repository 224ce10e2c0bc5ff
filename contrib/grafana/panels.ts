// Panels of the kinds that the dashboard has, with what all of one kind have in common.
import {
  AxisPlacement,
  BigValueColorMode,
  BigValueGraphMode,
  BigValueJustifyMode,
  BigValueTextMode,
  type DataSourceRef,
  GraphDrawStyle,
  HeatmapCellLayout,
  LegendDisplayMode,
  type Panel,
  PercentChangeColorMode,
  type RowPanel,
  ScaleDistribution,
  SortOrder,
  TableCellHeight,
  type ThresholdsConfig,
  ThresholdsMode,
  TooltipDisplayMode,
  VisibilityMode,
  VizOrientation,
} from "@grafana/schema";
import * as heatmaps from "@grafana/schema/dist/esm/raw/composable/heatmap/panelcfg/x/HeatmapPanelCfg_types.gen";
import type * as stats from "@grafana/schema/dist/esm/raw/composable/stat/panelcfg/x/StatPanelCfg_types.gen";
import type * as tables from "@grafana/schema/dist/esm/raw/composable/table/panelcfg/x/TablePanelCfg_types.gen";
import type * as graphs from "@grafana/schema/dist/esm/raw/composable/timeseries/panelcfg/x/TimeSeriesPanelCfg_types.gen";

export const prometheus: DataSourceRef = { type: "prometheus", uid: "${datasource}" };

/** A query of Prometheus; *legend* names its series. */
export interface Query {
  expr: string;
  legend?: string;
}

/** What is shown where; *description* says what it means and what to do. */
interface About {
  title: string;
  description: string;
  unit: string;
  width: number;
}

type Placed = Panel | RowPanel;

const HEIGHT = 8;
const STAT_HEIGHT = 4;

function target(query: Query, number: number, more: Record<string, unknown> = {}): Record<string, unknown> {
  const refId = String.fromCharCode("A".charCodeAt(0) + number);
  const legendFormat = query.legend ?? "__auto";
  return { refId, datasource: prometheus, expr: query.expr, legendFormat, range: true, ...more };
}

/** Green, and red from *red* on, or below it. */
export function redFrom(red: number): ThresholdsConfig {
  return { mode: ThresholdsMode.Absolute, steps: [{ value: null, color: "green" }, { value: red, color: "red" }] };
}

export function redBelow(red: number): ThresholdsConfig {
  return { mode: ThresholdsMode.Absolute, steps: [{ value: null, color: "red" }, { value: red, color: "green" }] };
}

const PLAIN: ThresholdsConfig = { mode: ThresholdsMode.Absolute, steps: [{ value: null, color: "blue" }] };

/** One number, and how it came to that. */
export function stat(about: Omit<About, "width">, expr: string, thresholds: ThresholdsConfig = PLAIN): Panel {
  const options: stats.Options = {
    colorMode: BigValueColorMode.Value,
    graphMode: BigValueGraphMode.Area,
    justifyMode: BigValueJustifyMode.Auto,
    orientation: VizOrientation.Auto,
    percentChangeColorMode: PercentChangeColorMode.Standard,
    reduceOptions: { calcs: ["lastNotNull"], values: false, fields: "" },
    showPercentChange: false,
    textMode: BigValueTextMode.Value,
    wideLayout: true,
  };
  return {
    type: "stat",
    title: about.title,
    description: about.description,
    datasource: prometheus,
    fieldConfig: { defaults: { unit: about.unit, thresholds }, overrides: [] },
    options: { ...options },
    targets: [target({ expr }, 0)],
    gridPos: { x: 0, y: 0, w: 3, h: STAT_HEIGHT },
  };
}

/** Lines over time; with *steps* values that jump. */
export function graph(about: About, queries: Query[], more: graphs.FieldConfig = {}): Panel {
  const custom: graphs.FieldConfig = {
    drawStyle: GraphDrawStyle.Line,
    fillOpacity: 10,
    lineWidth: 1,
    axisPlacement: AxisPlacement.Auto,
    ...more,
  };
  const options: graphs.Options = {
    legend: { displayMode: LegendDisplayMode.List, placement: "bottom", showLegend: true, calcs: [] },
    tooltip: { mode: TooltipDisplayMode.Multi, sort: SortOrder.Descending },
  };
  return {
    type: "timeseries",
    title: about.title,
    description: about.description,
    datasource: prometheus,
    fieldConfig: { defaults: { unit: about.unit, min: 0, custom: { ...custom } }, overrides: [] },
    options: { ...options },
    targets: queries.map((query, number) => target(query, number)),
    gridPos: { x: 0, y: 0, w: about.width, h: HEIGHT },
  };
}

/** How many observations there are in each bucket of a histogram, over time. */
export function heatmap(about: About, expr: string): Panel {
  const options: heatmaps.Options = {
    calculate: false,
    cellGap: 0,
    color: {
      mode: heatmaps.HeatmapColorMode.Scheme,
      scale: heatmaps.HeatmapColorScale.Exponential,
      exponent: 0.5,
      fill: "dark-orange",
      reverse: false,
      scheme: "Oranges",
      steps: 64,
    },
    exemplars: { color: "rgba(255,0,255,0.7)" },
    filterValues: { le: 1e-9 },
    legend: { show: true },
    rowsFrame: { layout: HeatmapCellLayout.le },
    showValue: VisibilityMode.Never,
    tooltip: { mode: TooltipDisplayMode.Single, yHistogram: true },
    yAxis: { axisPlacement: AxisPlacement.Left, unit: about.unit },
  };
  return {
    type: "heatmap",
    title: about.title,
    description: about.description,
    datasource: prometheus,
    fieldConfig: { defaults: { custom: { scaleDistribution: { type: ScaleDistribution.Linear } } }, overrides: [] },
    options: { ...options },
    targets: [target({ expr, legend: "{{le}}" }, 0, { format: "heatmap" })],
    gridPos: { x: 0, y: 0, w: about.width, h: HEIGHT },
  };
}

/** The labels and values of now, a series in each row; *hidden* labels are left out. */
export function table(about: About, expr: string, hidden: string[]): Panel {
  const options: tables.Options = { frameIndex: 0, showHeader: true, cellHeight: TableCellHeight.Sm };
  const excludeByName = Object.fromEntries(["Time", "__name__", "job", ...hidden].map((name) => [name, true]));
  return {
    type: "table",
    title: about.title,
    description: about.description,
    datasource: prometheus,
    fieldConfig: { defaults: { unit: about.unit }, overrides: [] },
    options: { ...options },
    targets: [target({ expr }, 0, { format: "table", instant: true, range: false })],
    transformations: [{ id: "organize", options: { excludeByName } }],
    gridPos: { x: 0, y: 0, w: about.width, h: HEIGHT },
  };
}

/** A heading over *panels*. */
export function row(title: string, panels: Panel[]): Placed[] {
  const gridPos = { x: 0, y: 0, w: 24, h: 1 };
  const heading: RowPanel = { type: "row", title, collapsed: false, id: 0, panels: [], gridPos };
  return [heading, ...panels];
}

/** The same, from left to right and from top to bottom, each with a number. */
export function placed(panels: Placed[]): Placed[] {
  let x = 0;
  let y = 0;
  let lowest = 0;
  return panels.map((panel, number) => {
    const { w = 24, h = 1 } = panel.gridPos ?? {};
    if (x + w > 24) {
      x = 0;
      y = lowest;
    }
    const gridPos = { x, y, w, h };
    lowest = Math.max(lowest, y + h);
    x += w;
    return { ...panel, id: number + 1, gridPos };
  });
}
