"""English names of the countries and regions that have a flag among the emoji, by their code in CLDR."""

from __future__ import annotations

_TABLE = """
ac ascension island|ad andorra|ae united arab emirates|af afghanistan|ag antigua and barbuda|ai anguilla
al albania|am armenia|ao angola|aq antarctica|ar argentina|as american samoa|at austria|au australia|aw aruba
ax åland islands|az azerbaijan|ba bosnia and herzegovina|bb barbados|bd bangladesh|be belgium|bf burkina faso
bg bulgaria|bh bahrain|bi burundi|bj benin|bl saint barthélemy|bm bermuda|bn brunei|bo bolivia
bq caribbean netherlands|br brazil|bs bahamas|bt bhutan|bv bouvet island|bw botswana|by belarus|bz belize
ca canada|cc cocos islands|cd democratic republic of the congo|cf central african republic
cg republic of the congo|ch switzerland|ci côte d'ivoire|ck cook islands|cl chile|cm cameroon|cn china
co colombia|cp clipperton island|cq sark|cr costa rica|cu cuba|cv cape verde|cw curaçao|cx christmas island
cy cyprus|cz czechia|de germany|dg diego garcia|dj djibouti|dk denmark|dm dominica|do dominican republic
dz algeria|ea ceuta and melilla|ec ecuador|ee estonia|eg egypt|eh western sahara|er eritrea|es spain
et ethiopia|eu european union|fi finland|fj fiji|fk falkland islands|fm micronesia|fo faroe islands|fr france
ga gabon|gb united kingdom|gd grenada|ge georgia|gf french guiana|gg guernsey|gh ghana|gi gibraltar
gl greenland|gm gambia|gn guinea|gp guadeloupe|gq equatorial guinea|gr greece|gs south georgia|gt guatemala
gu guam|gw guinea-bissau|gy guyana|hk hong kong|hm heard and mcdonald islands|hn honduras|hr croatia|ht haiti
hu hungary|ic canary islands|id indonesia|ie ireland|il israel|im isle of man|in india
io british indian ocean territory|iq iraq|ir iran|is iceland|it italy|je jersey|jm jamaica|jo jordan|jp japan
ke kenya|kg kyrgyzstan|kh cambodia|ki kiribati|km comoros|kn saint kitts and nevis|kp north korea
kr south korea|kw kuwait|ky cayman islands|kz kazakhstan|la laos|lb lebanon|lc saint lucia|li liechtenstein
lk sri lanka|lr liberia|ls lesotho|lt lithuania|lu luxembourg|lv latvia|ly libya|ma morocco|mc monaco
md moldova|me montenegro|mf saint martin|mg madagascar|mh marshall islands|mk north macedonia|ml mali
mm myanmar|mn mongolia|mo macao|mp northern mariana islands|mq martinique|mr mauritania|ms montserrat|mt malta
mu mauritius|mv maldives|mw malawi|mx mexico|my malaysia|mz mozambique|na namibia|nc new caledonia|ne niger
nf norfolk island|ng nigeria|ni nicaragua|nl netherlands|no norway|np nepal|nr nauru|nu niue|nz new zealand
om oman|pa panama|pe peru|pf french polynesia|pg papua new guinea|ph philippines|pk pakistan|pl poland
pm saint pierre and miquelon|pn pitcairn islands|pr puerto rico|ps palestine|pt portugal|pw palau|py paraguay
qa qatar|re réunion|ro romania|rs serbia|ru russia|rw rwanda|sa saudi arabia|sb solomon islands|sc seychelles
sd sudan|se sweden|sg singapore|sh saint helena|si slovenia|sj svalbard and jan mayen|sk slovakia
sl sierra leone|sm san marino|sn senegal|so somalia|sr suriname|ss south sudan|st são tomé and príncipe
sv el salvador|sx sint maarten|sy syria|sz eswatini|ta tristan da cunha|tc turks and caicos islands|td chad
tf french southern territories|tg togo|th thailand|tj tajikistan|tk tokelau|tl timor-leste|tm turkmenistan
tn tunisia|to tonga|tr turkey|tt trinidad and tobago|tv tuvalu|tw taiwan|tz tanzania|ua ukraine|ug uganda
um us outlying islands|un united nations|us united states|uy uruguay|uz uzbekistan|va vatican city
vc saint vincent and the grenadines|ve venezuela|vg british virgin islands|vi us virgin islands|vn vietnam
vu vanuatu|wf wallis and futuna|ws samoa|xk kosovo|ye yemen|yt mayotte|za south africa|zm zambia|zw zimbabwe
"""

COUNTRIES = {entry[:2]: entry[3:] for line in _TABLE.strip().splitlines() for entry in line.split("|")}
SUBDIVISIONS = {"gbeng": "england", "gbsct": "scotland", "gbwls": "wales"}
